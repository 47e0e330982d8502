"""Figure 1b of the paper (section 1): request latency against memory footprint."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from experiments.figures import charts, style

ID = "1b"
TITLE = "End-to-end request latency against memory, all systems and no offloading"
METRIC = "e2el_s"
MARKER_POINTS = 5.5


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    frame = charts.checked(frame, ID, mixed_modes)
    memory = (frame["slot_budget_bytes"] + frame["dense_bytes"]) / 1e9
    frame = frame.assign(memory_gb=memory)
    charts.single(frame, ("model", "dataset", "series", "memory_gb"), ID)
    models, datasets = charts.facets(frame)
    looks = charts.looks(frame)
    if frame.groupby(["model", "dataset", "series"]).size().max() == 1:
        looks = {name: {**look, "linestyle": ""} for name, look in looks.items()}
    width = style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES
    height = 0.6 + 1.7 * len(datasets)
    with (
        style.canvas(len(datasets), len(models), width, height) as figure,
        rc_context({"lines.markersize": MARKER_POINTS}),
    ):
        cells = [(dataset, model) for dataset in datasets for model in models]
        for axes, (dataset, model) in zip(figure.axes, cells, strict=True):
            part = frame[(frame["model"] == model) & (frame["dataset"] == dataset)]
            for name, look in looks.items():
                charts.line(axes, part[part["series"] == name], "memory_gb", METRIC, look)
            charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
            axes.set_xlim(0, 1.12 * part["memory_gb"].max())
            axes.set_yscale("log")
            axes.set_ylim(0.7 * part[METRIC].min(), 1.4 * part[METRIC].max())
            axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel("Memory for weights (GB)")
            if model == models[0]:
                axes.set_ylabel(style.METRICS[METRIC][0])
        charts.legend(figure, looks, "line", 6 if len(models) > 1 else 2)
        data = charts.drawn_data(frame, [METRIC], ["memory_gb"])
        return style.save(figure, data, place, ID, _caption(frame))


def _caption(frame: pd.DataFrame) -> str:
    notes = [
        f"Error bars: {charts.INTERVALS}. The latency axis is logarithmic.",
        "Memory: the expert budget (all experts where nothing is offloaded) and the weights that "
        "are always resident; keys, values and activations are not counted.",
    ]
    gap = charts.gaps(
        frame,
        {
            "model": charts.expected_models(frame),
            "dataset": charts.facets(frame)[1],
            "series": charts.expected_series(frame, (*style.PAPER_SYSTEMS, "resident")),
        },
    )
    return charts.caption(ID, TITLE, frame, notes, gap)
