"""What a run shows on the terminal: one opening line, progress, one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from experiments.datasets import PromptSet
from experiments.models import LoadedModel
from finemoe.testbed import Testbed

Advance = Callable[[int], None]


class Console:
    """Prints to the terminal; progress bars vanish when done, so that results stay readable."""

    def __init__(self) -> None:
        self._rich = RichConsole(highlight=False)

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

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """Show a bar over `total` requests while the block runs."""
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        hidden = not self._rich.is_terminal
        with Progress(*columns, console=self._rich, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    def skipped(self, record: Path) -> None:
        """Say that a complete record of this config is already there."""
        self._print(f"already complete: {escape(str(record))}")

    def results(self, record: dict[str, Any], path: Path, sample: tuple[str, str]) -> None:
        """Print some generated text, the table of results and where the record lies."""
        prompt, continuation = sample
        text = Text.assemble((prompt, "dim"), (continuation.rstrip(), "bold"))
        self._rich.print(Panel(text, title="first request: prompt, continuation", box=box.ROUNDED))
        title = (
            f"{record['system']} on {record['model']}, {record['memory_budget_gb']:.1f} GB "
            f"for experts ({record['mode']})"
        )
        summary = record["summary"]
        self._print(f"[bold]{title}[/]")
        self._rich.print(_latencies(summary), _experts(summary))
        self._print(_memory(summary))
        self._print(f"lossless: {_lossless(summary['lossless'])}")
        self._print(f"run record: {escape(str(path))}")

    def _print(self, line: str) -> None:
        self._rich.print(line, soft_wrap=True)


def _lossless(same: bool | None) -> str:
    if same is None:
        return "not verified"
    return "yes" if same else "[bold red]NO[/]"


def _latencies(summary: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("milliseconds", no_wrap=True)
    for column in ("mean", "95 % interval", "p50", "p95", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("E2EL", "e2el_s")):
        table.add_row(name, *_latency(summary[key]))
    return table


def _latency(values: dict[str, Any] | None) -> tuple[str, ...]:
    if values is None:
        return ("-",) * 5
    ci95 = values["ci95"]
    interval = f"{ci95[0] * 1e3:.1f} to {ci95[1] * 1e3:.1f}" if ci95 else "-"
    p50, p95, p99 = (f"{values[key] * 1e3:.1f}" for key in ("p50", "p95", "p99"))
    return (f"{values['mean'] * 1e3:.1f}", interval, p50, p95, p99)


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


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
