"""What a run shows on the terminal: one opening line, progress, one table."""

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

CONTROLS = re.compile(  # all but tab and line feed; marks of direction, halves of surrogates
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LOSSLESS = {None: ("not verified here", ""), True: ("yes", ""), False: ("NO", "bold red")}
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
        with bar_on(self._rich, hidden=self._rich.quiet or self._job is not None) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    def results(self, record: dict[str, Any], path: Path, sample: Sequence[str] | None) -> None:
        """Print generated text, if there is any, tables of results and where the record lies."""
        summary, budget = record["summary"], record["memory_budget_gb"]
        lossless = _lossless(summary)
        if self._job is not None:
            means = [(name, summary[f"{name.lower()}_s"]) for name in ("TTFT", "TPOT")]
            parts = [f"{name} {one['mean'] * 1e3:.1f} ms" for name, one in means if one]
            parts.append(f"hit rate {_share(summary['expert_hit_rate'])}")
            self._print(", ".join([*parts, f"lossless: {shown(lossless).plain}"]))
            return
        if sample is not None:
            text = shown((sample[0], "dim"), (sample[1].rstrip(), "bold"))
            title = "first request: prompt, continuation"
            self._rich.print(Panel(text, title=title, box=box.ROUNDED))
        held = "no budget" if budget is None else f"{budget:.1f} GB for experts"
        self._print("", f"{record['system']} on {record['model']}, {held} ({record['mode']})")
        for table in _tables(record):
            self._rich.print(table)
        for line in _notes(record):
            self._print(line)
        self._rich.print(shown("lossless: ", lossless))
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


def _lossless(summary: dict[str, Any]) -> str | tuple[str, str]:
    """Say whether logits, or else tokens, are those of the unoffloaded model."""
    note, same = summary.get("lossless_note"), summary.get("same_tokens")
    if note is None:
        return LOSSLESS[summary["lossless"]]
    return f"{note}; tokens: {shown(LOSSLESS[same]).plain}"


def _columns(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _tables(record: dict[str, Any]) -> Iterator[Table]:
    summary = record["summary"]
    large = summary["e2el_s"]["p99"] >= LONG_SECONDS
    scale, digits, unit = (1, 2, "seconds") if large else (1e3, 1, "milliseconds")
    times = _columns(unit, "mean", "95 % interval", "p50", "p95", "p99")
    for name in ("queueing", "TTFT", "TPOT", "ITL", "E2EL"):
        if values := summary.get(f"{name.lower()}_s"):
            numbers = [*(values["ci95"] or ()), *map(values.get, ("mean", "p50", "p95", "p99"))]
            *ends, mean, p50, p95, p99 = (f"{one * scale:.{digits}f}" for one in numbers)
            times.add_row(name, mean, " to ".join(ends) or "-", p50, p95, p99)
        elif name != "queueing":
            times.add_row(name, *"-----")
    yield times
    if record["memory_budget_gb"] is not None:
        kinds = ["hits", "late", "misses", *(["host"] if summary["host"] else [])]
        experts = _columns("experts", "hit rate", *kinds)
        for name, counts in {"all": summary, **summary["phases"]}.items():
            numbers = [f"{counts[kind]:,}" for kind in kinds]
            experts.add_row(name, _share(counts["expert_hit_rate"]), *numbers)
        yield experts


def _notes(record: dict[str, Any]) -> Iterator[str]:
    summary, positions = record["summary"], record.get("positions")

    def gb(name: str) -> float:
        return summary[name] / 1e9

    if record["memory_budget_gb"] is None:  # An engine without an expert cache.
        gathered, experts = gb("peak_gathered_expert_bytes"), gb("host_expert_bytes")
        taken = f"{gathered:.2f} at most, of {experts:.2f}; links: {record['links']}"
        yield f"GB of experts gathered at once: {taken}"
        if summary["peak_device_bytes"]:
            yield f"GB of device memory: {gb('peak_device_bytes'):.2f} at most"
    else:
        loaded = f"{gb('bytes_on_demand'):.1f} on demand, {gb('bytes_prefetched'):.1f} prefetched"
        loaded += f" ({gb('bytes_wasted'):.1f} in vain)"
        if summary["host"]:
            loaded += f", {gb('bytes_not_copied'):.1f} not, as the host computed"
        yield f"GB loaded: {loaded}"
        peak, budget = gb("peak_slot_bytes"), gb("slot_budget_bytes")
        yield f"GB in slots: {peak:.2f} at most, budget {budget:.2f}"
    if (bound := summary["bound"]) and bound["times"] >= 1:
        parts = f"compute alone {bound['compute_s']:.1f} s, loads that none can avoid"
        parts += f" {bound['link_s']:.1f} s"
        if bound.get("path_s"):
            parts += f", as each waits for the other {bound['path_s']:.1f} s"
        yield f"{bound['times']:.2f} x the bound: {parts}"
    elif bound:
        yield "no bound: compute alone was timed on a busy machine"
    if positions and positions["beyond"]:
        ran = f"{positions['beyond']} of {positions['of']} requests run past the model's"
        yield f"{ran} {positions['model']:,} positions (up to {positions['longest']:,}), untrained"
    if (costs := record.get("prediction_costs") or "").startswith("assumed"):
        yield f"prediction costs {costs}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
