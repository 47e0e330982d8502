"""What a run shows on the terminal: one opening line, progress, one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finemoe.offload.policy import ModelShape

CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and line feed, marks of direction, halves of surrogate pairs."""
LOSSLESS: dict[bool | None, str | tuple[str, str]] = {
    None: "not verified here",
    True: "yes",
    False: ("NO", "bold red"),
}
LONG_SECONDS = 100  # from an end-to-end latency of this p99 on, latencies are shown in seconds


class Console:
    """Prints to the terminal; of a `job` beside others, a line when it starts and when it ends."""

    def __init__(self, quiet: bool = False, job: str | None = None) -> None:
        self._rich, self._job = RichConsole(highlight=False, markup=False, quiet=quiet), job

    def announce(self, lines: Sequence[str]) -> None:
        """Say what runs where, before anything takes time; the first word is bold."""
        name, space, rest = lines[0].partition(" ")
        self._print("\n".join([space + rest, *lines[1:]]), name)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar over `total` requests while the block runs."""
        with bar_on(self._rich, hidden=self._rich.quiet or self._job is not None) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    def skipped(self, record: Path, other_code: str | None) -> None:
        """Say that a complete record of this config is already there, and if other code made it."""
        note = f" ({other_code})" if other_code else ""
        self._print(f"already complete: {record}{note}")

    def results(self, record: dict[str, Any], path: Path, sample: tuple[str, str] | None) -> None:
        """Print generated text, if there is any, tables of results and where the record lies."""
        summary, budget = record["summary"], record["memory_budget_gb"]
        if self._job is not None:
            self._print(_brief(summary))
            return
        if sample is not None:
            text = shown((sample[0], "dim"), (sample[1].rstrip(), "bold"))
            title = "first request: prompt, continuation"
            self._rich.print(Panel(text, title=title, box=box.ROUNDED))
        held = "no budget" if budget is None else f"{budget:.1f} GB for experts"
        self._print("", f"{record['system']} on {record['model']}, {held} ({record['mode']})")
        self._rich.print(_latencies(summary))
        if budget is None:
            self._print(_gathered(summary, record["links"]))
        else:
            self._rich.print(_experts(summary))
            self._print(_memory(summary))
        if (bound := summary["bound"]) and bound["times"] >= 1:
            parts = f"compute alone {bound['compute_s']:.1f} s, loads that none can avoid"
            self._print(f"{bound['times']:.2f} x the bound: {parts} {bound['link_s']:.1f} s")
        elif bound:
            self._print("no bound: compute alone was timed on a busy machine")
        positions, costs = record.get("positions"), record.get("prediction_costs") or ""
        if positions and positions["beyond"]:
            self._print(
                f"{positions['beyond']} of {positions['of']} requests run past the model's "
                f"{positions['model']:,} positions (the longest has {positions['longest']:,}): "
                "beyond them it was never trained"
            )
        if costs.startswith("assumed"):
            self._print(f"prediction costs {costs}")
        self._rich.print(shown("lossless: ", _lossless(summary)))
        self._print(f"run record: {path}")

    def _print(self, text: str, bold: str = "") -> None:
        """Print text after a bold beginning; of a job among others, one line with its name."""
        if self._job is not None:
            text, bold = f"{self._job}: {bold}{text}".partition("\n")[0], ""
        self._rich.print(shown((bold, "bold"), text), soft_wrap=True)


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
    count, experts = sum(slots), shape.layers * shape.experts
    share = f"{count} slots for {experts} ({count / experts:.0%})"
    return f"experts {shape.layers} x {shape.experts}, top-{shape.top_k}; {share}"


def _brief(summary: dict[str, Any]) -> str:
    """Return the results in one line."""
    times = [(name, summary[f"{name.lower()}_s"]) for name in ("TTFT", "TPOT")]
    parts = [f"{name} {time['mean'] * 1e3:.1f} ms" for name, time in times if time]
    parts += [f"hit rate {_share(summary.get('expert_hit_rate'))}"]
    return ", ".join([*parts, f"lossless: {shown(_lossless(summary)).plain}"])


def _lossless(summary: dict[str, Any]) -> str | tuple[str, str]:
    """Say whether logits, or else tokens, are those of the unoffloaded model."""
    note, same = summary.get("lossless_note"), summary.get("same_tokens")
    if note is None:
        return LOSSLESS[summary["lossless"]]
    return f"{note}; tokens: {shown(LOSSLESS[same]).plain}"


def _columns(*names: str) -> Table:
    """Return an empty table, its first column flush left."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _latencies(summary: dict[str, Any]) -> Table:
    seconds = summary["e2el_s"]["p99"] >= LONG_SECONDS
    scale, digits = (1, 2) if seconds else (1e3, 1)
    unit = "seconds" if seconds else "milliseconds"
    table = _columns(unit, "mean", "95 % interval", "p50", "p95", "p99")
    for name in ("queueing", "TTFT", "TPOT", "ITL", "E2EL"):
        if values := summary.get(f"{name.lower()}_s"):
            numbers = [*(values["ci95"] or ()), *map(values.get, ("mean", "p50", "p95", "p99"))]
            *ends, mean, p50, p95, p99 = (f"{one * scale:.{digits}f}" for one in numbers)
            table.add_row(name, mean, " to ".join(ends) or "-", p50, p95, p99)
        elif name != "queueing":
            table.add_row(name, *"-----")
    return table


def _experts(summary: dict[str, Any]) -> Table:
    kinds = ["hits", "late", "misses", *(["host"] if summary["host"] else [])]
    table = _columns("experts", "hit rate", *kinds)
    for name, counts in {"all": summary, **summary["phases"]}.items():
        numbers = (f"{counts[kind]:,}" for kind in kinds)
        table.add_row(name, _share(counts["expert_hit_rate"]), *numbers)
    return table


def _memory(summary: dict[str, Any]) -> str:
    names = ("bytes_on_demand", "bytes_prefetched", "bytes_wasted")
    demand, prefetched, wasted = (f"{summary[name] / 1e9:.1f}" for name in names)
    peak, budget = summary["peak_slot_bytes"] / 1e9, summary["slot_budget_bytes"] / 1e9
    loaded = f"GB loaded: {demand} on demand, {prefetched} prefetched ({wasted} in vain)"
    if summary["host"]:
        loaded += f", {summary['bytes_not_copied'] / 1e9:.1f} not, as the host computed"
    return f"{loaded}\nGB in slots: {peak:.2f} at most, budget {budget:.2f}"


def _gathered(summary: dict[str, Any], links: str) -> str:
    """Say what an engine without an expert cache took."""
    gathered, experts = summary["peak_gathered_expert_bytes"], summary["host_expert_bytes"]
    device = summary["peak_device_bytes"]
    whole = "" if device is None else f"; device memory {device / 1e9:.2f} at most"
    taken = f"{gathered / 1e9:.2f} at most, of {experts / 1e9:.2f}{whole}"
    return f"GB of experts gathered at once: {taken}; links: {links}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
