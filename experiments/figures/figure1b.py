"""Figure 1b of the paper (section 1): request latency against memory footprint."""

from pathlib import Path

import pandas as pd
from matplotlib.ticker import MaxNLocator

from experiments import style
from experiments.figures import charts

NAMES = ("1b", "End-to-end request latency against memory, all systems and no offloading")
METRIC = "e2el_s"
NOTES = (
    f"Error bars: {charts.INTERVALS}. The latency axis is logarithmic.",
    "Memory: the expert budget (all experts where nothing is offloaded) and the weights that "
    "are always resident; keys, values and activations are not counted.",
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw the figure, as `experiments.figures` says."""
    frame = charts.checked(frame, NAMES[0], mixed_modes)
    frame["memory_gb"] = (frame["slot_budget_bytes"] + frame["dense_bytes"]) / 1e9
    charts.single(frame, NAMES[0], "memory_gb")
    own: style.Look = {"markersize": 5.5}
    if not frame.duplicated(["model", "dataset", "series"]).any():
        own["linestyle"] = ""
    looks = {name: {**look, **own} for name, look in charts.looks(frame).items()}
    labels = "Memory for weights (GB)", style.METRICS[METRIC][0]
    with charts.dataset_panels(frame, *labels) as (figure, panels):
        for axes, part in panels:
            charts.lines(axes, part, "memory_gb", METRIC, looks)
            axes.set_xlim(0, 1.12 * part["memory_gb"].max())
            charts.log_axis(axes)
            axes.set_ylim(0.7 * part[METRIC].min(), 1.4 * part[METRIC].max())
            axes.xaxis.set_major_locator(MaxNLocator(5))
        charts.legend(figure, looks, columns=6, narrow=2)
        data = charts.drawn_data(frame, [METRIC], "memory_gb")
        charts.save(figure, output, NAMES, frame, data, NOTES)
