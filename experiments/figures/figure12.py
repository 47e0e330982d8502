"""Figure 12 of the paper (section 6.3): TPOT against the expert cache limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import NullLocator

from experiments.figures import charts, style

ID = "12"
TITLE = "TPOT against the memory limit of the expert cache"
LIMITS = (6, 12, 24, 48, 96)
METRIC = "tpot_s"


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    frame = charts.checked(frame, ID, mixed_modes)
    frame = frame.assign(limit_gb=[_limit(row) for row in charts.rows_of(frame)])
    charts.single(frame, ("model", "dataset", "series", "limit_gb"), ID)
    models, datasets = charts.facets(frame)
    looks = charts.looks(frame)
    limits = sorted(set(frame["limit_gb"]))
    width = style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES
    with style.canvas(len(datasets), len(models), width, 0.6 + 1.7 * len(datasets)) as figure:
        cells = [(dataset, model) for dataset in datasets for model in models]
        for axes, (dataset, model) in zip(figure.axes, cells, strict=True):
            part = frame[(frame["model"] == model) & (frame["dataset"] == dataset)]
            for name, look in looks.items():
                charts.line(axes, part[part["series"] == name], "limit_gb", METRIC, look, limits)
            charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(limits, [f"{limit:g}" for limit in limits])
            axes.set_ylim(bottom=0)
            axes.set_xlabel("Expert cache limit (GB)")
            if model == models[0]:
                axes.set_ylabel(style.METRICS[METRIC][0])
        charts.legend(figure, looks, "line", 5 if len(models) > 1 else 2)
        data = charts.drawn_data(frame, [METRIC], ["limit_gb"])
        return style.save(figure, data, place, ID, _caption(frame))


def _limit(row: dict[str, Any]) -> float:
    asked = row["memory_budget"]
    return float(row["memory_budget_gb"] if asked.endswith("%") else asked)


def _caption(frame: pd.DataFrame) -> str:
    notes = [
        f"Error bars: {charts.INTERVALS}.",
        "Limits above what all experts take (Mixtral 90 GB, Qwen 25 GB, Phi 81 GB) hold them all.",
    ]
    gap = charts.gaps(
        frame,
        {
            "model": charts.expected_models(frame),
            "dataset": charts.facets(frame)[1],
            "series": charts.expected_series(frame, style.PAPER_SYSTEMS),
            "limit_gb": sorted({*LIMITS, *frame["limit_gb"]}),
        },
    )
    return charts.caption(ID, TITLE, frame, notes, gap)
