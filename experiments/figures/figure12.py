"""Figure 12 of the paper (section 6.3): TPOT against the expert cache limit."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from experiments.figures import charts, style

ID = "12"
TITLE = "TPOT against the memory limit of the expert cache"
LIMITS = (6, 12, 24, 48, 96)
METRIC = "tpot_s"
NOTES = (
    f"Error bars: {charts.INTERVALS}.",
    "Limits above what all experts take (Mixtral 90 GB, Qwen 25 GB, Phi 81 GB) hold them all.",
)


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure, as `experiments.figures` says."""
    frame = charts.checked(frame, ID, mixed_modes)
    share = frame["memory_budget"].str.endswith("%")
    asked = frame["memory_budget"].where(~share, frame["memory_budget_gb"])
    frame = frame.assign(limit_gb=asked.astype(float))
    charts.single(frame, ID, "limit_gb")
    looks = charts.looks(frame)
    limits = sorted(set(frame["limit_gb"]))

    def panel(axes: Axes, part: pd.DataFrame) -> None:
        for name, look in looks.items():
            charts.line(axes, part[part["series"] == name], "limit_gb", METRIC, look, limits)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(limits, [f"{limit:g}" for limit in limits])
        axes.set_ylim(bottom=0)

    labels = "Expert cache limit (GB)", style.METRICS[METRIC][0]
    with charts.dataset_panels(frame, labels, panel) as figure:
        charts.legend(figure, looks, "line", narrow=2)
        data = charts.drawn_data(frame, [METRIC], ["limit_gb"])
        return charts.save(
            figure, place, (ID, TITLE), frame, data, NOTES,
            series=charts.expected_series(frame), limit_gb=sorted({*LIMITS, *limits}),
        )  # fmt: skip
