"""The bootstrap: a quantity is an array, first its estimate, then its resamples.

So differences, ratios and averages are array arithmetic. Runs that served the same requests of a
dataset are resampled alike: they are paired. Averages over cells draw cells, and requests in each.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

RESAMPLES = 2000
Draws = NDArray[np.float64]  # shape (1 + RESAMPLES,): the estimate, then its resamples

LATENCIES = ("ttft_s", "tpot_s", "e2el_s", "service_s", "itl_s", "queueing_s")
RATIOS = {  # of sums over batches: the requests of a batch share their iterations
    "hit_rate": (["hits"], ["hits", "late", "misses", "host"]),
    "iteration_s": (["e2el_s"], ["output_tokens"]),
}
Z95 = 1.959963984540054


@lru_cache(maxsize=16)
def weights(units: int, *key: object) -> NDArray[np.float64]:
    """Return how often each unit counts, shape (1 + RESAMPLES, units); one key, one drawing."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), RESAMPLES)
    counts = np.vstack([np.ones(units), drawn])
    counts.flags.writeable = False
    return counts


def request_draws(requests: pd.DataFrame, metric: str, dataset: str) -> Draws:
    """Return a metric over a run's requests: a mean latency, `e2el_s@0.9`, or one of RATIOS.

    Requests of a batch and repeats of a request are drawn together: they depend on each other.
    Raises ValueError for an unknown metric and for a run without any value.
    """
    clusters = requests.groupby("batch")["request"].transform("min").to_numpy()
    names, units = np.unique(clusters, return_inverse=True)
    counts = weights(len(names), dataset, *names.tolist())
    column, _, level = metric.partition("@")
    if column in RATIOS:
        above, below = RATIOS[column]
        rows = requests.reindex(columns=sorted({*above, *below}))
        rows = rows.assign(unit=units).groupby(requests["batch"]).max()
        values, parts = (rows[one].sum(axis=1).to_numpy(float) for one in (above, below))
    elif column in LATENCIES:
        rows = requests.assign(unit=units).dropna(subset=[column])
        values, parts = rows[column].to_numpy(float), np.ones(len(rows))
    else:
        raise ValueError(f"metric {metric}: choose one of {', '.join([*RATIOS, *LATENCIES])}")
    if not parts.any():
        raise ValueError(f"no request has a {column}")
    counts = counts[:, rows["unit"].to_numpy()]
    if not level:
        return ratio(counts @ values, counts @ parts)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[:, order], axis=1)
    return values[order][(reached >= float(level) * reached[:, -1:]).argmax(axis=1)]


def ratio(above: Draws, below: Draws) -> Draws:
    """Return a ratio, draw by draw; where `below` is 0 it is not finite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return above / below


def table_draws(row: Any, value: str, key: tuple[Any, ...]) -> Draws:
    """Return a table's value, normal as its interval `low`, `high` says; one key, one drawing."""
    draws = constant(float(row[value]))
    low, high = row.get("low", np.nan), row.get("high", np.nan)
    if np.isfinite([low, high]).all():
        random = np.random.default_rng([ord(letter) for letter in repr(key)])
        draws[1:] += random.standard_normal(RESAMPLES) * (float(high) - float(low)) / (2 * Z95)
    return draws


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
    if not np.isfinite(draws).all() or np.ptp(draws) == 0:
        return None
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return float(low), float(high)


def limits(draws: Draws) -> tuple[float, float]:
    """Return the 95 % interval; where nothing varied, the estimate itself."""
    return interval(draws) or (float(draws[0]), float(draws[0]))


def spearman(x: Sequence[float], ys: Sequence[Draws]) -> Draws:
    """Return the rank correlation of x with a curve, in every draw; 0 for a flat curve."""
    y_ranks, x_ranks = (pd.DataFrame(values).rank().to_numpy() for values in (np.stack(ys), x))
    y_centred, x_centred = y_ranks - y_ranks.mean(axis=0), (x_ranks - x_ranks.mean())[:, 0]
    size = np.sqrt((x_centred**2).sum() * (y_centred**2).sum(axis=0))
    return np.divide(x_centred @ y_centred, size, out=np.zeros_like(size), where=size > 0)
