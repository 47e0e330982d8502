"""Figure 11 of the paper (section 6.2.2): the distribution of end-to-end latency, served online."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.figures import charts, style

ID = "11"
TITLE = "Distribution of the end-to-end request latency, queueing included, online serving"
LEVEL = 0.05
"""One less the level of the band: 95 %."""
NOTES = (
    "Bands: 95 % simultaneous (Dvoretzky-Kiefer-Wolfowitz), as if requests were independent; "
    "those that queue together are not, so the true ones may be wider.",
    "Stores and collections start empty.",
)


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure, as `experiments.figures` says, of the request tables of online runs."""
    frame = charts.checked(frame, ID, mixed_modes, workload="online")
    charts.single(frame, ID)
    looks = {name: {**look, "marker": ""} for name, look in charts.looks(frame).items()}
    curves = _curves(frame)

    def panel(axes: Axes, part: pd.DataFrame) -> None:
        for name, look in looks.items():
            _curve(axes, part[part["series"] == name], look)
        axes.set_ylim(0, 1.005)
        axes.set_xlim(left=0)

    labels = style.METRICS["e2el_s"][0], "Share of requests"
    with charts.dataset_panels(curves, labels, panel) as figure:
        charts.legend(figure, looks, "line", narrow=2)
        series = charts.expected_series(frame)
        return charts.save(figure, place, (ID, TITLE), frame, curves, NOTES, series=series)


def _curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the steps of each run's empirical distribution: latency, share, band."""
    tables = []
    for row in charts.rows_of(frame):
        latency = np.sort(row["table"]["e2el_s"].to_numpy(dtype=float))
        share = np.arange(1, len(latency) + 1) / len(latency)
        # Dvoretzky, Kiefer and Wolfowitz's inequality with Massart's constant.
        reach = math.sqrt(math.log(2 / LEVEL) / (2 * len(latency)))
        band = {"share_low": share - reach, "share_high": share + reach}
        columns = {
            **{key: row[key] for key in ("model", "dataset", "series")},
            "e2el_s": latency,
            "share": share,
            **{name: np.clip(end, 0, 1) for name, end in band.items()},
            **{key: row[key] for key in ("mode", "testbed", "weights", "digest")},
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _curve(axes: Axes, part: pd.DataFrame, look: charts.Look) -> None:
    if part.empty:
        return
    latency, colour = part["e2el_s"].to_numpy(), look["color"]
    axes.step(
        np.concatenate([[latency[0]], latency]), np.concatenate([[0.0], part["share"]]),
        where="post", color=colour, linestyle=look["linestyle"],
    )  # fmt: skip
    axes.fill_between(
        latency, part["share_low"], part["share_high"], step="post", color=colour, alpha=0.13, lw=0
    )
