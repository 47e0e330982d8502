"""Figure 15 of the paper (section 6.6): TTFT and TPOT of FineMoE against the prefetch distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.figures import charts, style

ID = "15"
TITLE = "TTFT and TPOT of FineMoE against the prefetch distance d"
DISTANCES = tuple(range(1, 9))
PAPER_DISTANCE = {"mixtral": 3, "qwen": 6, "phi": 4}
"""Section 6.1: the distances that the paper found best."""
ROWS = ("ttft_s", "tpot_s")


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    ours = frame[frame["system"] == "finemoe"] if len(frame) else frame
    frame = charts.checked(ours, ID, mixed_modes)
    frame = frame.assign(series=[_series(row, frame) for row in charts.rows_of(frame)])
    charts.single(frame, ("model", "dataset", "series", "prefetch_distance"), ID)
    models, datasets = charts.facets(frame)
    looks = _looks(frame, datasets)
    distances = sorted(set(frame["prefetch_distance"]))
    width = style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES
    with style.canvas(len(ROWS), len(models), width, 3.0) as figure:
        panels = iter(figure.axes)
        for metric in ROWS:
            for model in models:
                axes = next(panels)
                part = frame[frame["model"] == model]
                if model in PAPER_DISTANCE:
                    axes.axvline(PAPER_DISTANCE[model], color="#777777", linestyle=":", zorder=1)
                for name, look in looks.items():
                    rows = part[part["series"] == name]
                    charts.line(axes, rows, "prefetch_distance", metric, look, distances)
                axes.set_xticks(distances)
                axes.margins(y=0.15)
                if metric == ROWS[0]:
                    charts.panel_title(axes, model, None)
                else:
                    axes.set_xlabel("Prefetch distance d (layers)")
                if model == models[0]:
                    axes.set_ylabel(style.METRICS[metric][0])
        figure.align_ylabels()
        if len(looks) > 1:
            charts.legend(figure, looks, "line")
        data = charts.drawn_data(frame, ROWS, ["prefetch_distance"])
        return style.save(figure, data, place, ID, _caption(frame))


def _series(row: dict[str, Any], frame: pd.DataFrame) -> str:
    mark = f" ({row['mode']})" if frame["mode"].nunique() > 1 else ""
    return f"{style.dataset_name(row['dataset'])}{mark}"


def _looks(frame: pd.DataFrame, datasets: list[str]) -> dict[str, charts.Look]:
    """Datasets differ in shade, modes in line."""
    shades, shapes = ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), "osD^"
    found: dict[str, charts.Look] = {}
    for place, dataset in enumerate(datasets):
        names = sorted(set(frame.loc[frame["dataset"] == dataset, "series"]))
        for number, name in enumerate(names):
            found[name] = {
                "color": shades[place % len(shades)],
                "marker": shapes[place % len(shapes)],
                "linestyle": style.DASHES[number % len(style.DASHES)],
            }
    return found


def _caption(frame: pd.DataFrame) -> str:
    notes = [
        f"Error bars: {charts.INTERVALS}.",
        "Dotted: the distance that the paper found best. Vertical axes do not start at zero.",
    ]
    gap = charts.gaps(
        frame,
        {
            "model": charts.expected_models(frame),
            "dataset": charts.facets(frame)[1],
            "prefetch_distance": sorted({*DISTANCES, *frame["prefetch_distance"]}),
        },
    )
    return charts.caption(ID, TITLE, frame, notes, gap)
