"""What a run shows on the terminal: one opening line, progress, one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from finemoe.offload.policy import ModelShape

Advance = Callable[[int], None]
CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and line feed, marks of direction, halves of surrogate pairs."""
LOSSLESS: dict[bool | None, str | tuple[str, str]] = {
    None: "not verified here",
    True: "yes",
    False: ("NO", "bold red"),
}
LONG_SECONDS = 100
"""From an end-to-end latency of this p99 on, latencies are shown in seconds."""


class Console:
    """Prints to the terminal; progress bars vanish when done, so that results stay readable.

    Jobs side by side share a terminal: with the name of its `job`, a run shows one line when it
    starts and one when it ends, and no bar.
    """

    def __init__(self, quiet: bool = False, job: str | None = None) -> None:
        self._rich, self._job = RichConsole(highlight=False, markup=False, quiet=quiet), job

    def announce(self, lines: Sequence[str]) -> None:
        """Say what runs where, before anything takes time; the first word is bold."""
        name, space, rest = lines[0].partition(" ")
        self._print((name, space + rest), *lines[1:])

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """Show a bar over `total` requests while the block runs."""
        with bar_on(self._rich, hidden=self._rich.quiet or self._job is not None) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    def skipped(self, record: Path, other_code: str | None) -> None:
        """Say that a complete record of this config is already there, and if other code made it."""
        note = f" ({other_code})" if other_code else ""
        self._print(f"already complete: {record}{note}")

    def results(self, record: dict[str, Any], path: Path, sample: tuple[str, str] | None) -> None:
        """Print generated text, if there is any, the table of results and where the record lies."""
        if self._job is not None:
            self._print(_brief(record["summary"]))
            return
        if sample is not None:
            text = shown((sample[0], "dim"), (sample[1].rstrip(), "bold"))
            title = "first request: prompt, continuation"
            self._rich.print(Panel(text, title=title, box=box.ROUNDED))
        title = (
            f"{record['system']} on {record['model']}, {_budget(record['memory_budget_gb'])} "
            f"({record['mode']})"
        )
        summary = record["summary"]
        self._print((title, ""))
        self._rich.print(_latencies(summary))
        if record["memory_budget_gb"] is None:
            self._print(_gathered(summary, record["links"]))
        else:
            self._rich.print(_experts(summary))
            self._print(_memory(summary))
        if summary["bound"] is not None:
            self._print(_bound(summary["bound"]))
        for line in _cautions(record):
            self._print(line)
        self._rich.print(shown("lossless: ", LOSSLESS[summary["lossless"]]))
        self._print(f"run record: {path}")

    def _print(self, *lines: str | tuple[str, str]) -> None:
        """Print lines, of a pair the first part bold; of a job among others, one with its name."""
        parts = [("", line) if isinstance(line, str) else line for line in lines]
        if self._job is not None:
            parts = [(f"{self._job}: ", "".join(parts[0]))]
        text = Text("\n").join(shown((bold, "bold"), plain) for bold, plain in parts)
        self._rich.print(text, soft_wrap=True)


def shown(*parts: str | tuple[str, str]) -> Text:
    """Return texts, some with a style, as they are, but for what a terminal would obey."""
    text = Text.assemble(*parts)
    text.plain = CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.plain)
    return text


def bar_on(rich: RichConsole, hidden: bool = False) -> Progress:
    """Return a bar that vanishes when done; there is none where there is no terminal."""
    columns = TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn()
    hidden = hidden or not rich.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=rich, transient=True, disable=hidden)


def slots_line(shape: ModelShape, slots: Sequence[int]) -> str:
    """Say how many of the experts have a slot."""
    experts = shape.layers * shape.experts
    return (
        f"experts {shape.layers} x {shape.experts}, top-{shape.top_k}; "
        f"{sum(slots)} slots for {experts} ({sum(slots) / experts:.0%})"
    )


def _brief(summary: dict[str, Any]) -> str:
    """Return the results in one line."""
    times = {name: summary[key] for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))}
    told = [f"{name} {time['mean'] * 1e3:.1f} ms" for name, time in times.items() if time]
    told += [f"hit rate {_share(summary.get('expert_hit_rate'))}"]
    return ", ".join([*told, f"lossless: {shown(LOSSLESS[summary['lossless']]).plain}"])


def _cautions(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader of the numbers must know and would not guess."""
    positions, costs = record.get("positions"), record.get("prediction_costs")
    if positions and positions["beyond"]:
        yield (
            f"{positions['beyond']} of {positions['of']} requests run past the model's "
            f"{positions['model']:,} positions (the longest has {positions['longest']:,}): "
            "beyond them it was never trained"
        )
    if costs and costs.startswith("assumed"):
        yield f"prediction costs {costs}"


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
    if bound["times"] < 1:
        return "no bound: compute alone was timed on a busy machine"
    return (
        f"{bound['times']:.2f} x the bound: compute alone {bound['compute_s']:.1f} s, "
        f"loads that none can avoid {bound['link_s']:.1f} s"
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
