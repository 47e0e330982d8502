"""What a run shows on the terminal: one opening line, progress, one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from experiments.datasets import PromptSet
from experiments.models import LoadedModel
from finemoe.testbed import SimulatedTestbed, Testbed
from finemoe.trace import Trace

Advance = Callable[[int], None]
LONG_SECONDS = 100
"""From an end-to-end latency of this p99 on, latencies are shown in seconds."""


class Console:
    """Prints to the terminal; progress bars vanish when done, so that results stay readable."""

    def __init__(self, quiet: bool = False) -> None:
        self._rich = RichConsole(highlight=False, quiet=quiet)

    def announce(
        self, testbed: Testbed, model: LoadedModel, prompts: PromptSet, slots: Sequence[int]
    ) -> None:
        """Say what runs where, before anything takes time."""
        shape = model.offloaded.shape
        experts = shape.layers * shape.experts
        self._print(f"[bold]{model.name}[/] ({escape(model.weights)} weights, {testbed.mode})")
        place = f"testbed {testbed.name}, {len(testbed.devices)} device(s)"
        if testbed.mode == "emulated":
            load = testbed.load_seconds(model.full_expert_bytes)
            place += f", {load * 1e3:.2f} ms to load an expert"
        self._print(place)
        self._print(
            f"experts {shape.layers} x {shape.experts}, top-{shape.top_k}; "
            f"{sum(slots)} slots for {experts} ({sum(slots) / experts:.0%})"
        )
        self._print(f"prompts from {prompts.dataset}: {escape(prompts.source)}")

    def announce_plain(
        self, cfg: DictConfig, device: torch.device, links: str, prompts: PromptSet
    ) -> None:
        """Say what runs where, without our engine."""
        self._print(f"[bold]{cfg.model.name}[/] ({escape(str(cfg.weights))} weights) on {device}")
        self._print(f"system {cfg.system.label}: memory_budget is not applicable; links: {links}")
        self._print(f"prompts from {prompts.dataset}: {escape(prompts.source)}")

    def announce_replay(
        self, testbed: SimulatedTestbed, cfg: DictConfig, trace: Trace, slots: Sequence[int]
    ) -> None:
        """Say what is simulated, and from which trace."""
        shape, origin = trace.header.shape, trace.header.provenance
        experts = shape.layers * shape.experts
        self._print(
            f"[bold]{cfg.model.name}[/] (routing of {escape(str(origin.get('weights')))} weights, "
            f"simulated) on {testbed.name}, {testbed.devices} device(s)"
        )
        self._print(
            f"experts {shape.layers} x {shape.experts}, top-{shape.top_k}; "
            f"{sum(slots)} slots for {experts} ({sum(slots) / experts:.0%})"
        )
        self._print(f"routing from {escape(str(trace.path))}: {escape(str(origin.get('dataset')))}")

    def recording(self, path: Path) -> None:
        """Say that a trace is recorded first, once."""
        self._print(f"recording the routing once, to {escape(str(path))}")

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """Show a bar over `total` requests while the block runs."""
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        hidden = self._rich.quiet or not self._rich.is_terminal
        with Progress(*columns, console=self._rich, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    def skipped(self, record: Path, other_code: str | None) -> None:
        """Say that a complete record of this config is already there, and if other code made it."""
        note = f" ({other_code})" if other_code else ""
        self._print(f"already complete: {escape(str(record))}{note}")

    def results(self, record: dict[str, Any], path: Path, sample: tuple[str, str] | None) -> None:
        """Print generated text, if there is any, the table of results and where the record lies."""
        if sample is not None:
            text = Text.assemble((sample[0], "dim"), (sample[1].rstrip(), "bold"))
            title = "first request: prompt, continuation"
            self._rich.print(Panel(text, title=title, box=box.ROUNDED))
        title = (
            f"{record['system']} on {record['model']}, {_budget(record['memory_budget_gb'])} "
            f"({record['mode']})"
        )
        summary = record["summary"]
        self._print(f"[bold]{title}[/]")
        self._rich.print(_latencies(summary))
        if record["memory_budget_gb"] is None:
            self._print(_gathered(summary, record["links"]))
        else:
            self._rich.print(_experts(summary))
            self._print(_memory(summary))
        if summary["bound"] is not None:
            self._print(_bound(summary["bound"]))
        self._print(f"lossless: {_lossless(summary['lossless'])}")
        self._print(f"run record: {escape(str(path))}")

    def _print(self, line: str) -> None:
        self._rich.print(line, soft_wrap=True)


def _lossless(same: bool | None) -> str:
    if same is None:
        return "not verified here"
    return "yes" if same else "[bold red]NO[/]"


def _latencies(summary: dict[str, Any]) -> Table:
    unit = "seconds" if summary["e2el_s"]["p99"] >= LONG_SECONDS else "milliseconds"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column(unit, no_wrap=True)
    for column in ("mean", "95 % interval", "p50", "p95", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    queueing = [("queueing", "queueing_s")] if summary.get("queueing_s") else []
    latencies = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("E2EL", "e2el_s"))
    for name, key in (*queueing, *latencies):
        table.add_row(name, *_latency(summary[key], unit))
    return table


def _latency(values: dict[str, Any] | None, unit: str) -> tuple[str, ...]:
    if values is None:
        return ("-",) * 5

    def show(seconds: float) -> str:
        return f"{seconds:.2f}" if unit == "seconds" else f"{seconds * 1e3:.1f}"

    ci95 = values["ci95"]
    interval = f"{show(ci95[0])} to {show(ci95[1])}" if ci95 else "-"
    return (show(values["mean"]), interval, *(show(values[key]) for key in ("p50", "p95", "p99")))


def _experts(summary: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("experts", no_wrap=True)
    for column in ("hit rate", "hits", "late", "misses"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, counts in {"all": summary, **summary["phases"]}.items():
        found = (f"{counts[kind]:,}" for kind in ("hits", "late", "misses"))
        table.add_row(name, _share(counts["expert_hit_rate"]), *found)
    return table


def _memory(summary: dict[str, Any]) -> str:
    moved = {
        kind: f"{summary[f'bytes_{kind}'] / 1e9:.1f}"
        for kind in ("prefetched", "on_demand", "wasted")
    }
    slots = [f"{summary[k] / 1e9:.2f}" for k in ("peak_slot_bytes", "slot_budget_bytes")]
    return (
        f"GB loaded: {moved['on_demand']} on demand, {moved['prefetched']} prefetched "
        f"({moved['wasted']} in vain)\nGB in slots: {slots[0]} at most, budget {slots[1]}"
    )


def _bound(bound: dict[str, float]) -> str:
    return (
        f"{bound['times']:.2f} x the bound: {bound['compute_s']:.1f} s of compute alone, "
        f"{bound['link_s']:.1f} s for the bytes that must cross the links"
    )


def _gathered(summary: dict[str, Any], links: str) -> str:
    gathered, held = (
        f"{summary[key] / 1e9:.2f}" for key in ("peak_gathered_expert_bytes", "host_expert_bytes")
    )
    device = summary["peak_device_bytes"]
    whole = "" if device is None else f"; device memory {device / 1e9:.2f} at most"
    return f"GB of experts gathered at once: {gathered} at most, of {held}{whole}; links: {links}"


def _budget(gigabytes: float | None) -> str:
    return "no budget" if gigabytes is None else f"{gigabytes:.1f} GB for experts"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
