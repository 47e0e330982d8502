"""Beyond the paper: TPOT of all systems against the memory for experts, and what bounds it."""

from pathlib import Path

import pandas as pd

from experiments import style
from experiments.figures import charts

NAMES = ("frontier", "TPOT against the memory for experts")
METRIC = "tpot_s"
RESIDENT, ORACLE = "resident", "oracle"
NOTES = (
    f"Error bars: {charts.INTERVALS}. Vertical axes are logarithmic and differ by model.",
    "Dotted: nothing offloaded, compute alone. Dashed: the oracle, a greedy reference that is told "
    "the routing beforehand. Records bound the time of whole runs, not TPOT, so no bound is drawn.",
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw the figure, as `experiments.figures` says."""
    frame = charts.checked(frame, NAMES[0], mixed_modes)
    charts.single(frame, NAMES[0], "memory_budget")
    looks = charts.looks(frame, [ORACLE, RESIDENT])
    for name in set(frame.loc[frame["system"] == RESIDENT, "series"]):
        looks[name]["linestyle"] = ":"
    labels = charts.BUDGET, style.METRICS[METRIC][0]
    with charts.dataset_panels(frame, *labels) as (figure, panels):
        for axes, part in panels:
            floor = part["system"] == RESIDENT
            for name, tpot in part.loc[floor, ["series", METRIC]].itertuples(index=False):
                axes.axhline(1e3 * tpot, **looks[name])
            charts.lines(axes, part[~floor], "memory_budget_gb", METRIC, looks)
            charts.budget_axis(axes, part[~floor])
            charts.log_axis(axes)
        charts.legend(figure, looks, narrow=2)
        data = charts.drawn_data(frame, [METRIC, "ttft_s", "hit_rate"])
        charts.save(figure, output, NAMES, frame, data, NOTES)
