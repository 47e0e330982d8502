"""Figure 11 of the paper (section 6.2.2): the distribution of end-to-end latency, served online."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import charts, style

ID = "11"
TITLE = "Distribution of the end-to-end request latency, queueing included, online serving"
LEVEL = 0.05
"""One less the level of the band: 95 %."""


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame` of online runs.

    Raises UserError without online records, for mixed modes unless asked for, and for two of one
    cell.
    """
    online = frame[frame["workload"] == "online"] if len(frame) else frame
    frame = charts.checked(online, ID, mixed_modes)
    charts.single(frame, ("model", "dataset", "series"), ID)
    models, datasets = charts.facets(frame)
    looks = charts.looks(frame)
    curves = _curves(frame)
    width = style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES
    with style.canvas(len(datasets), len(models), width, 0.6 + 1.7 * len(datasets)) as figure:
        cells = [(dataset, model) for dataset in datasets for model in models]
        for axes, (dataset, model) in zip(figure.axes, cells, strict=True):
            part = curves[(curves["model"] == model) & (curves["dataset"] == dataset)]
            for name, look in looks.items():
                _curve(axes, part[part["series"] == name], look)
            charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
            axes.set_ylim(0, 1.005)
            axes.set_xlim(left=0)
            axes.set_xlabel(style.METRICS["e2el_s"][0])
            if model == models[0]:
                axes.set_ylabel("Share of requests")
        _legend(figure, looks, len(models))
        return style.save(figure, curves, place, ID, _caption(frame))


def _curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the steps of each run's empirical distribution: latency, share, band."""
    tables = []
    for row in charts.rows_of(frame):
        latency = np.sort(row["table"]["e2el_s"].to_numpy(dtype=float))
        share = np.arange(1, len(latency) + 1) / len(latency)
        # Dvoretzky, Kiefer and Wolfowitz's inequality with Massart's constant.
        reach = math.sqrt(math.log(2 / LEVEL) / (2 * len(latency)))
        names = {key: row[key] for key in ("model", "dataset", "series")}
        tables.append(
            pd.DataFrame(
                {
                    **names,
                    "e2el_s": latency,
                    "share": share,
                    "share_low": np.clip(share - reach, 0, 1),
                    "share_high": np.clip(share + reach, 0, 1),
                    **{key: row[key] for key in ("mode", "testbed", "weights", "digest")},
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _curve(axes: Axes, part: pd.DataFrame, look: charts.Look) -> None:
    if part.empty:
        return
    latency = part["e2el_s"].to_numpy()
    axes.step(
        np.concatenate([[latency[0]], latency]),
        np.concatenate([[0.0], part["share"]]),
        where="post",
        color=look["color"],
        linestyle=look["linestyle"],
    )
    axes.fill_between(
        latency,
        part["share_low"],
        part["share_high"],
        step="post",
        color=look["color"],
        alpha=0.13,
        linewidth=0,
    )


def _legend(figure: Figure, looks: dict[str, charts.Look], panels: int) -> None:
    plain = {name: {**look, "marker": ""} for name, look in looks.items()}
    charts.legend(figure, plain, "line", 5 if panels > 1 else 2)


def _caption(frame: pd.DataFrame) -> str:
    notes = [
        "Bands: 95 % simultaneous (Dvoretzky-Kiefer-Wolfowitz), as if requests were independent; "
        "those that queue together are not, so the true ones may be wider.",
        "Stores and collections start empty.",
    ]
    gap = charts.gaps(
        frame,
        {
            "model": charts.expected_models(frame),
            "dataset": charts.facets(frame)[1],
            "series": charts.expected_series(frame, style.PAPER_SYSTEMS),
        },
    )
    return charts.caption(ID, TITLE, frame, notes, gap)
