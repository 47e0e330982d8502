"""Figure 15 of the paper (section 6.6): TTFT and TPOT of FineMoE against the prefetch distance."""

from itertools import cycle
from pathlib import Path

import pandas as pd

from experiments import style
from experiments.figures import charts

NAMES = ("15", "TTFT and TPOT of FineMoE against the prefetch distance d")
PAPER_DISTANCE = {"mixtral": 3, "qwen": 6, "phi": 4}
"""Section 6.1: the distances that the paper found best."""
METRICS = ("ttft_s", "tpot_s")
LOOKS = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "D"), ("#CC79A7", "^"))
"""Colour and marker of each dataset."""
NOTES = (
    f"Error bars: {charts.INTERVALS}.",
    "Dotted: the distance that the paper found best. Vertical axes do not start at zero.",
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw the figure, as `experiments.figures` says."""
    frame = charts.checked(frame, NAMES[0], mixed_modes, system="finemoe")
    frame["series"] = charts.named_after(frame["dataset"].map(style.dataset_name), frame)
    charts.single(frame, NAMES[0], "prefetch_distance")
    base = dict(zip(charts.facets(frame)[1], cycle(LOOKS), strict=False))
    looks = charts.variants(frame, "dataset", base)
    distances = sorted(set(frame["prefetch_distance"]))
    with charts.metric_panels(frame, METRICS, 3.0) as (figure, panels):
        for axes, metric, model in panels:
            if model in PAPER_DISTANCE:
                axes.axvline(PAPER_DISTANCE[model], color="#777777", linestyle=":", zorder=1)
            part = frame[frame["model"] == model]
            charts.lines(axes, part, "prefetch_distance", metric, looks, distances)
            axes.set_xticks(distances)
            axes.margins(y=0.15)
            if metric != METRICS[0]:
                axes.set_xlabel("Prefetch distance d (layers)")
        if len(looks) > 1:
            charts.legend(figure, looks)
        data = charts.drawn_data(frame, METRICS, "prefetch_distance")
        charts.save(figure, output, NAMES, frame, data, NOTES)
