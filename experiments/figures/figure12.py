"""Figure 12 of the paper (section 6.3): TPOT against the expert cache limit."""

from pathlib import Path

import pandas as pd
from matplotlib.ticker import NullLocator

from experiments import style
from experiments.figures import charts

NAMES = ("12", "TPOT against the memory limit of the expert cache")
METRIC = "tpot_s"
NOTES = (
    f"Error bars: {charts.INTERVALS}.",
    "Limits above what all experts take (Mixtral 90 GB, Qwen 25 GB, Phi 81 GB) hold them all.",
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw the figure, as `experiments.figures` says."""
    frame = charts.checked(frame, NAMES[0], mixed_modes)
    asked = pd.to_numeric(frame["memory_budget"], errors="coerce")
    frame["limit_gb"] = asked.fillna(frame["memory_budget_gb"]).astype(float)
    charts.single(frame, NAMES[0], "limit_gb")
    looks, limits = charts.looks(frame), sorted(set(frame["limit_gb"]))
    labels = "Expert cache limit (GB)", style.METRICS[METRIC][0]
    with charts.dataset_panels(frame, *labels) as (figure, panels):
        for axes, part in panels:
            charts.lines(axes, part, "limit_gb", METRIC, looks, limits)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(limits, [f"{limit:g}" for limit in limits])
            axes.set_ylim(bottom=0)
        charts.legend(figure, looks, narrow=2)
        data = charts.drawn_data(frame, [METRIC], "limit_gb")
        charts.save(figure, output, NAMES, frame, data, NOTES)
