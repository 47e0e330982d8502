"""Figure 17 of the paper (section 6.7): where the time of one iteration of FineMoE goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.figures import charts, style

ID = "17"
TITLE = "Mean latency of one iteration of FineMoE and of its parts"
PARTS = {
    "iteration": ("Whole iteration", "whole"),
    "on_demand_wait": ("On-demand loading", "synchronous"),
    "prefetch_wait": ("Waiting for prefetches", "synchronous"),
    "context_collection": ("Context collection", "synchronous"),
    "rest": ("Compute and the rest", "synchronous"),
    "search": ("Map search", "asynchronous"),
    "prefetch_issue": ("Issuing prefetches", "asynchronous"),
    "update": ("Store update", "asynchronous"),
}
"""Part to its name and whether the model waits for it."""
COLOURS = {"whole": "#222222", "synchronous": "#D55E00", "asynchronous": "#0072B2"}
NAMES = ("whole iteration", "synchronous: the model waits", "asynchronous: beside the model")
LEGEND: dict[str, charts.Look] = {
    name: {"color": colour, "marker": "o", "linestyle": "-"}
    for name, colour in zip(NAMES, COLOURS.values(), strict=True)
}
LEAST_MS = 1e-2
"""Shorter parts, zero among them, are drawn here, at the left edge."""
ROOM = 1.75
"""Length of the axis over that of its longest part, in decades: values stand at the right."""
NOTES = (
    "Means over prefill and decode iterations, logarithmic axis; in brackets, the share of the "
    "iteration. Bar at the whole iteration: 95 % bootstrap interval; records hold parts as "
    "totals, without an interval.",
    "Asynchronous parts run beside the model and do not add up with the others.",
)


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw a panel a model, dataset and mode of offline runs, as `experiments.figures` says."""
    frame = charts.checked(frame, ID, mixed_modes, system="finemoe", workload="offline")
    charts.single(frame, ID)
    models, datasets = charts.facets(frame)
    runs = sorted(
        charts.rows_of(frame),
        key=lambda run: (models.index(run["model"]), run["dataset"], run["series"]),
    )
    parts = pd.concat([_parts(run) for run in runs], ignore_index=True)
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    width = style.PAGE_INCHES if columns > 1 else style.COLUMN_INCHES
    with style.canvas(lines, columns, width, 0.3 + 1.75 * lines) as figure:
        for axes in figure.axes[len(runs) :]:
            axes.set_visible(False)
        several = len(datasets) > 1
        longest = float(parts["milliseconds_high"].max())
        for number, (axes, run) in enumerate(zip(figure.axes, runs, strict=False)):
            part = parts[parts["run"] == run["path"]]
            _panel(axes, charts.rows_of(part), longest, number % columns == 0)
            charts.panel_title(axes, run["model"], run["dataset"] if several else None)
            variant = run["series"].removeprefix(style.system_name("finemoe"))
            axes.set_title(axes.get_title() + variant, pad=3)
        charts.legend(figure, LEGEND, "line", 3 if columns > 1 else 1)
        data = parts.drop(columns="run")
        return charts.save(figure, place, (ID, TITLE), frame, data, NOTES)


def _parts(run: dict[str, Any]) -> pd.DataFrame:
    """Return the parts of one run's mean iteration, in milliseconds; `rest` is what none covers."""
    spent = {name: run.get(f"phase_{name}_s", math.nan) / run["iterations"] for name in PARTS}
    spent["iteration"] = run["iteration_s"]
    waits = [spent[name] for name in ("on_demand_wait", "prefetch_wait", "context_collection")]
    spent["rest"] = run["iteration_s"] - float(np.nansum(waits))
    table = pd.DataFrame({"part": list(PARTS), "kind": [kind for _, kind in PARTS.values()]})
    milliseconds = 1e3 * np.array([spent[name] for name in PARTS])
    # Records hold parts as totals: the whole iteration alone has an interval.
    low, high = (1e3 * run[f"iteration_s_{end}"] for end in ("low", "high"))
    names = ("model", "dataset", "series", "mode", "testbed", "weights", "digest")
    return table.assign(
        milliseconds=milliseconds,
        milliseconds_low=np.where(table["part"] == "iteration", low, math.nan),
        milliseconds_high=np.where(table["part"] == "iteration", high, math.nan),
        share=milliseconds / milliseconds[0],
        iterations=run["iterations"],
        run=run["path"],
        **{name: run[name] for name in names},
    )


def _panel(axes: Axes, parts: list[dict[str, Any]], longest: float, first: bool) -> None:
    """Draw one dot a part on a logarithmic axis, its value written beside it."""
    for place, part in enumerate(parts):
        _part(axes, place, part)
    axes.set_xscale("log")
    decades = math.log10(longest / LEAST_MS)
    axes.set_xlim(LEAST_MS, LEAST_MS * 10 ** (ROOM * decades))
    powers = range(-2, math.ceil(math.log10(longest)) + 1, 2)
    axes.set_xticks([10.0**power for power in powers], [f"{10.0**power:g}" for power in powers])
    axes.minorticks_off()
    axes.set_ylim(len(parts) - 0.5, -0.5)
    names = [name for name, _ in PARTS.values()]
    axes.set_yticks(range(len(PARTS)), names if first else [""] * len(PARTS))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Latency per iteration (ms)")


def _part(axes: Axes, place: int, part: dict[str, Any]) -> None:
    milliseconds, colour = part["milliseconds"], COLOURS[part["kind"]]
    known = math.isfinite(milliseconds)
    at = max(milliseconds, LEAST_MS) if known else LEAST_MS
    note = _value(part) if known else "not recorded"
    if known:
        axes.plot([LEAST_MS, at], [place, place], color=colour, linewidth=0.8)
        axes.plot(at, place, "o", color=colour, markersize=4, clip_on=False, zorder=3)
    ends = [part["milliseconds_low"], part["milliseconds_high"]]
    if known and all(map(math.isfinite, ends)):
        axes.plot(ends, [place, place], "|-", color=colour, linewidth=1.0, markersize=8)
        at = max(at, ends[1])
    axes.annotate(
        note, (at, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7
    )


def _value(part: dict[str, Any]) -> str:
    milliseconds, share = part["milliseconds"], part["share"]
    if milliseconds == 0:
        return "0"
    number = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.2g}"
    if part["part"] == "iteration":
        return number
    return f"{number} (< 0.1 %)" if share < 1e-3 else f"{number} ({100 * share:.1f} %)"
