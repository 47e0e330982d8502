"""Bootstrap draws: every quantity is an array whose first entry is the estimate.

The other entries are the quantity in resamples, so that differences, ratios and averages of
quantities are plain array arithmetic and their 95 % interval is two percentiles. Two runs that
served the same requests of a dataset are resampled alike, request by request: they are paired.
Averages over (model, dataset) cells draw cells, and requests within each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

RESAMPLES = 2000
Draws = NDArray[np.float64]
"""Shape (1 + RESAMPLES,): the estimate, then its resamples."""

LATENCIES = ("ttft_s", "tpot_s", "e2el_s")


def weights(units: int, *key: object) -> NDArray[np.float64]:
    """Return how often each unit counts, shape (1 + RESAMPLES, units); one key, one drawing."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), RESAMPLES)
    return np.vstack([np.ones(units), drawn])


def request_draws(requests: pd.DataFrame, metric: str, dataset: str) -> Draws:
    """Return a metric over a run's requests: `hit_rate`, a mean latency, or `e2el_s@0.9`.

    Requests that shared a batch, and repeats of a request, are drawn together, as they depend on
    each other. Raises ValueError for an unknown metric and for a run without any value.
    """
    clusters = requests.groupby("batch")["request"].transform("min").to_numpy()
    names, units = np.unique(clusters, return_inverse=True)
    counts = weights(len(names), dataset, *names.tolist())[:, units]
    column, _, quantile = metric.partition("@")
    if column == "hit_rate":
        hits = requests["hits"].to_numpy(float)
        asked = hits + requests["late"].to_numpy() + requests["misses"].to_numpy()
        return _ratio(counts, hits, asked)
    if column not in LATENCIES:
        raise ValueError(f"metric {metric}: choose hit_rate or one of {', '.join(LATENCIES)}")
    values = requests[column].to_numpy(float)
    there = ~np.isnan(values)
    if not there.any():
        raise ValueError(f"no request has a {column}")
    if quantile:
        return _quantile(counts[:, there], values[there], float(quantile))
    return _ratio(counts, np.where(there, values, 0.0), there.astype(float))


def _ratio(counts: NDArray[Any], above: NDArray[Any], below: NDArray[Any]) -> Draws:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts @ above) / (counts @ below)


def _quantile(counts: NDArray[Any], values: NDArray[Any], level: float) -> Draws:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[:, order], axis=1)
    first = (reached >= level * reached[:, -1:]).argmax(axis=1)
    return values[order][first]


def constant(value: float) -> Draws:
    """Return a quantity that does not vary within its cell."""
    return np.full(1 + RESAMPLES, float(value))


def cell_mean(cells: Sequence[Draws]) -> Draws:
    """Return the mean over cells, drawn as well as what is in them; one cell is itself."""
    stacked = np.stack(cells)
    drawn = weights(len(cells), "cells", len(cells)).T / len(cells)
    return (stacked * drawn).sum(axis=0)


def interval(draws: Draws) -> tuple[float, float] | None:
    """Return the 95 % percentile interval; None if nothing varied or a draw is not finite."""
    resamples = draws[1:]
    if not np.isfinite(draws).all() or np.ptp(draws) == 0:
        return None
    low, high = np.percentile(resamples, [2.5, 97.5])
    return float(low), float(high)


def spearman(x: Sequence[float], ys: Sequence[Draws]) -> Draws:
    """Return the rank correlation of x with a curve, in every draw; 0 for a flat curve."""
    ranks = pd.DataFrame(np.stack(ys)).rank().to_numpy()
    places = pd.Series(x).rank().to_numpy()
    places = places - places.mean()
    centred = ranks - ranks.mean(axis=0)
    size = np.sqrt((places**2).sum() * (centred**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, (places @ centred) / size, 0.0)
