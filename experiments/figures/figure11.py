"""Figure 11 of the paper (section 6.2.2): the distribution of end-to-end latency, served online."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments import style
from experiments.figures import charts

ID = "11"
TITLE = "Distribution of the end-to-end request latency, queueing included, online serving"
NOTES = (
    "Bands: 95 % simultaneous (Dvoretzky-Kiefer-Wolfowitz), as if requests were independent; "
    "those that queue together are not, so the true ones may be wider.",
    "Stores and collections start empty.",
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw the figure, as `experiments.figures` says, of the request tables of online runs."""
    frame = charts.checked(frame, ID, mixed_modes, workload="online")
    charts.single(frame, ID)
    looks = charts.unmarked(charts.looks(frame))
    curves = pd.concat(map(curve, charts.rows_of(frame)), ignore_index=True)
    labels = style.METRICS["e2el_s"][0], "Share of requests"
    with charts.dataset_panels(curves, *labels) as (figure, panels):
        for axes, part in panels:
            for name, look in looks.items():
                _steps(axes, part[part["series"] == name], look)
            axes.set_ylim(0, 1.005)
            axes.set_xlim(left=0)
        charts.legend(figure, looks, narrow=2)
        series = charts.expected_series(frame)
        charts.save(figure, output, (ID, TITLE), frame, curves, NOTES, series=series)


def curve(run: dict[str, Any]) -> pd.DataFrame:
    """Return the steps of a run's empirical distribution: latency, share and its 95 % band."""
    latency = np.sort(run["table"]["e2el_s"].to_numpy(dtype=float))
    share = np.arange(1, len(latency) + 1) / len(latency)
    # Dvoretzky, Kiefer and Wolfowitz's inequality with Massart's constant.
    reach = math.sqrt(math.log(2 / 0.05) / (2 * len(latency)))
    columns = {
        **{key: run[key] for key in ("model", "dataset", "series")},
        "e2el_s": latency,
        "share": share,
        "share_low": np.clip(share - reach, 0, 1),
        "share_high": np.clip(share + reach, 0, 1),
        **{key: run[key] for key in ("mode", "testbed", "weights", "digest")},
    }
    return pd.DataFrame(columns)


def _steps(axes: Axes, part: pd.DataFrame, look: style.Look) -> None:
    if part.empty:
        return
    latency, colour = part["e2el_s"].to_numpy(), look["color"]
    from_zero = np.r_[latency[0], latency], np.r_[0.0, part["share"]]
    axes.step(*from_zero, where="post", color=colour, linestyle=look["linestyle"])
    ends = part["share_low"], part["share_high"]
    axes.fill_between(latency, *ends, step="post", color=colour, alpha=0.13, lw=0)
