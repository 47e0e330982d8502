"""Figure 11 of the paper (section 6.2.2): the distribution of end-to-end latency, served online."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures import charts

NAME = "11"
LATENCIES = {"service_s": "Service time (s)", "e2el_s": "Queueing and service (s)"}


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Distribution of the request latency, with and without queueing, online serving.

    Bands: 95 % simultaneous (Dvoretzky-Kiefer-Wolfowitz), as if requests were independent; those
    that queue together are not, so the true ones may be wider. Stores and collections start empty.
    """
    frame = charts.checked(frame, NAME, mixed_modes, workload="online")
    charts.single(frame, NAME)
    looks = charts.unmarked(charts.looks(frame))
    each = product(frame.to_dict("records"), LATENCIES)
    curves = pd.concat([curve(run, latency) for run, latency in each], ignore_index=True)
    models, datasets = charts.facets(frame)
    rows = list(product(datasets, LATENCIES))
    size = 0.6 + 1.5 * len(rows), charts.width_of(models)
    with charts.panels(rows, models, *size) as (figure, panels):
        for axes, (dataset, latency), model in panels:
            part = charts.part_of(curves[curves["latency"] == latency], model, dataset)
            for name, look in looks.items():
                steps = part[part["series"] == name]
                if steps.empty:
                    continue
                seconds, line = steps["seconds"], {"c": look["color"], "ls": look["linestyle"]}
                from_zero = np.r_[seconds.iloc[0], seconds], np.r_[0.0, steps["share"]]
                axes.step(*from_zero, where="post", **line)
                band = {"step": "post", "color": look["color"], "alpha": 0.13, "lw": 0}
                axes.fill_between(seconds, steps["share_low"], steps["share_high"], **band)
            if latency == "service_s":
                charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
            label = "Share of requests" if model == models[0] else ""
            axes.set(xlabel=LATENCIES[latency], ylabel=label, ylim=(0, 1.005))
            axes.set_xlim(left=0)
        charts.legend(figure, looks, narrow=2)
        charts.write(figure, curves, output, NAME, charts.caption(NAME, draw.__doc__, frame))


def curve(run: Any, latency: str) -> pd.DataFrame:
    """Return the steps of a run's empirical distribution: seconds, share and its 95 % band."""
    seconds = np.sort(run["table"][latency].to_numpy(dtype=float))
    share = np.arange(1, len(seconds) + 1) / len(seconds)
    # Dvoretzky, Kiefer and Wolfowitz's inequality with Massart's constant.
    reach = math.sqrt(math.log(2 / 0.05) / (2 * len(seconds)))
    low, high = np.clip(share - reach, 0, 1), np.clip(share + reach, 0, 1)
    steps = {"seconds": seconds, "share": share, "share_low": low, "share_high": high}
    names, source = ("model", "dataset", "series"), ("mode", "testbed", "weights", "digest")
    whose, made = ({key: run[key] for key in keys} for keys in (names, source))
    return pd.DataFrame({**whose, "latency": latency, **steps, **made})
