"""Figure 17 of the paper (section 6.7): where the time of one iteration of FineMoE goes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments import style
from experiments.figures import charts

NAME = "17"
PARTS = {  # part to its name and whether the model waits for it
    "iteration": ("Whole iteration", "whole"),
    "on_demand_wait": ("On-demand loading", "synchronous"),
    "prefetch_wait": ("Waiting for prefetches", "synchronous"),
    "context_collection": ("Context collection", "synchronous"),
    "rest": ("Compute and the rest", "synchronous"),
    "search": ("Map search", "asynchronous"),
    "prefetch_issue": ("Issuing prefetches", "asynchronous"),
    "update": ("Store update", "asynchronous"),
}
KINDS = {
    "whole": ("whole iteration", "#222222"),
    "synchronous": ("synchronous: the model waits", "#D55E00"),
    "asynchronous": ("asynchronous: beside the model", "#0072B2"),
}
LEAST_MS = 1e-2  # shorter parts, zero among them, are drawn here, at the left edge
ROOM = 1.75  # length of the axis over that of its longest part, in decades


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Mean latency of one iteration of FineMoE and of its parts.

    Means over prefill and decode iterations, logarithmic axis; in brackets, the share of the
    iteration. Bar at the whole iteration: 95 % bootstrap interval; records hold parts as totals,
    without an interval. Asynchronous parts run beside the model and do not add up with the others.
    """
    frame = charts.checked(frame, NAME, mixed_modes, system="finemoe", workload="offline")
    charts.single(frame, NAME)
    models, datasets = charts.facets(frame)
    frame = frame.assign(order=frame["model"].map(models.index))
    runs: Any = frame.sort_values(["order", "dataset", "series"], kind="stable").to_dict("records")
    parts = [parts_of(run) for run in runs]
    data = pd.concat(parts, ignore_index=True)
    longest = data["milliseconds_high"].max()
    columns = min(3, len(runs))
    rows = math.ceil(len(runs) / columns)
    size = 0.3 + 1.75 * rows, charts.width_of(runs)
    with charts.panels(range(rows), range(columns), *size) as (figure, panels):
        for axes, _, _ in panels[len(runs) :]:
            axes.set_visible(False)
        for (axes, _, column), run, part in zip(panels, runs, parts, strict=False):
            _panel(axes, part, longest, named=column == 0)
            charts.panel_title(axes, run["model"], run["dataset"] if len(datasets) > 1 else None)
            variant = run["series"].removeprefix(style.system_name("finemoe"))
            axes.set_title(axes.get_title() + variant)
        look = {"marker": "o", "linestyle": "-"}
        looks = {name: {"color": colour, **look} for name, colour in KINDS.values()}
        charts.legend(figure, looks, columns=3 if columns > 1 else 1)
        charts.write(figure, data, output, NAME, charts.caption(NAME, draw.__doc__, frame))


def parts_of(run: Any) -> pd.DataFrame:
    """Return the parts of one run's mean iteration, in milliseconds; `rest` is what none covers."""
    spent = {name: run.get(f"phase_{name}_s", math.nan) / run["iterations"] for name in PARTS}
    spent["iteration"] = run["iteration_s"]
    waits = [spent[name] for name in ("on_demand_wait", "prefetch_wait", "context_collection")]
    spent["rest"] = run["iteration_s"] - float(np.nansum(waits))
    parts = pd.DataFrame({"part": list(PARTS), "kind": [kind for _, kind in PARTS.values()]})
    parts["milliseconds"] = 1e3 * np.array([spent[name] for name in PARTS])
    # Records hold parts as totals: the whole iteration alone has an interval.
    for end in ("low", "high"):
        parts.loc[0, f"milliseconds_{end}"] = 1e3 * run[f"iteration_s_{end}"]
    parts["share"] = parts["milliseconds"] / parts["milliseconds"][0]
    names = ("iterations", "model", "dataset", "series", "mode", "testbed", "weights", "digest")
    return parts.assign(**{name: run[name] for name in names})


def _panel(axes: Axes, parts: pd.DataFrame, longest: float, named: bool) -> None:
    y, colours = np.arange(len(parts)), [KINDS[kind][1] for kind in parts["kind"]]
    end = parts["milliseconds"].clip(lower=LEAST_MS)
    axes.hlines(y, LEAST_MS, end, colours, linewidth=0.8)
    axes.scatter(end, y, 25, colours, linewidth=0, clip_on=False, zorder=3)
    low, high = parts["milliseconds_low"], parts["milliseconds_high"]
    axes.plot([low[0], high[0]], [0, 0], "|-", color=colours[0], linewidth=1.0, markersize=8)
    right = parts[["milliseconds", "milliseconds_high"]].max(axis=1).fillna(0).clip(LEAST_MS)
    offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    for row, part in enumerate(parts.to_dict("records")):
        axes.annotate(_value(part), (right[row], row), fontsize=7, **offset)
    axes.set_xscale("log")
    decades = math.log10(longest / LEAST_MS)
    axes.set_xlim(LEAST_MS, LEAST_MS * 10 ** (ROOM * decades))
    powers = [10.0**power for power in range(-2, math.ceil(math.log10(longest)) + 1, 2)]
    axes.set_xticks(powers, [f"{power:g}" for power in powers])
    axes.minorticks_off()
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.set_yticks(y, [name if named else "" for name, _ in PARTS.values()])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Latency per iteration (ms)")


def _value(part: Any) -> str:
    milliseconds, share = part["milliseconds"], part["share"]
    if not math.isfinite(milliseconds):
        return "not recorded"
    if milliseconds == 0:
        return "0"
    number = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.2g}"
    if part["part"] == "iteration":
        return number
    return f"{number} (< 0.1 %)" if share < 1e-3 else f"{number} ({100 * share:.1f} %)"
