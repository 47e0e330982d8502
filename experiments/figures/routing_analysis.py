"""What routing looks like: balance, entropy, overlap and activation heatmaps of recorded requests.

For the routing report and figures 3a, 3b, 3c, 8 and 9 of the paper. N counts iterations, L layers,
J experts, h hidden size; entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.bootstrap import limits, weights
from finemoe.offload.policy import FloatArray
from finemoe.offload.routed import RoutedIteration, joined
from finemoe.trace import TracedRequest


@dataclass(frozen=True)
class Iterations:
    """Every iteration of some requests, request after request; each begins with its prefill."""

    request: NDArray[np.int64]
    """Position of the request that an iteration belongs to, shape (N,)."""
    decode: NDArray[np.bool_]
    """Whether an iteration decodes one token, shape (N,)."""
    counts: NDArray[np.int64]
    """Tokens that go to each expert, shape (N, L, J)."""
    maps: FloatArray
    """Expert maps, shape (N, L, J): gate probabilities, in a prefill the mean over its tokens."""
    last: FloatArray
    """Gate probabilities of an iteration's last token, shape (N, L, J)."""
    embeddings: FloatArray
    """Token embeddings, shape (N, h), in a prefill the mean over its tokens."""
    hidden_states: FloatArray
    """Inputs of the MoE blocks for an iteration's last token, shape (N, L, h)."""

    def at(self, chosen: NDArray[np.bool_]) -> Iterations:
        """Return the iterations that a mask (N,) chooses."""
        return Iterations(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def by_request(self) -> Iterator[Iterations]:
        """Yield the iterations of one request after the other."""
        for request in np.unique(self.request):
            yield self.at(self.request == request)


def iterations(requests: Sequence[TracedRequest]) -> Iterations:
    """Return the iterations of recorded requests.

    Raises ValueError if there are none, or if they lack logits, embeddings or hidden states.
    """
    if not requests:
        raise ValueError("there is no recorded request to analyse; record at least one")
    routed = [(n, step) for n, request in enumerate(requests) for step in _routed(request)]
    steps = [step for _, step in routed]
    return Iterations(
        request=np.array([n for n, _ in routed]),
        decode=np.array([step.iteration.phase == "decode" for step in steps]),
        counts=np.stack([step.counts for step in steps]).astype(np.int64),
        maps=_stacked([step.probabilities.mean(axis=1) for step in steps]),
        last=_stacked([step.probabilities[:, -1] for step in steps]),
        embeddings=_stacked([step.embeddings.mean(axis=0) for step in steps]),
        hidden_states=_stacked([step.hidden_states[:, -1] for step in steps]),
    )


def _routed(request: TracedRequest) -> Iterator[RoutedIteration]:
    context = 0
    for number, step in enumerate(request.steps):
        context += step.tokens
        yield joined(number, [request.number], [step], [context])


def _stacked(arrays: Sequence[FloatArray]) -> FloatArray:
    return np.stack(arrays).astype(np.float32)


# Balance and overlap ------------------------------------------------------------------------------


def load_balance(routed: Iterations) -> pd.DataFrame:
    """Return, by layer, the smallest and largest expert's share of the tokens over 1/J."""
    counts = routed.counts.sum(axis=0)
    shares = counts * counts.shape[1] / counts.sum(axis=1, keepdims=True)
    return pd.DataFrame(
        {"smallest": shares.min(axis=1), "largest": shares.max(axis=1)}
    ).rename_axis("layer")


def consecutive_overlap(routed: Iterations) -> pd.DataFrame:
    """Return, by layer, the share of a decoded token's experts that its predecessor used as well.

    The first decoded token of a request is left out: its predecessor is a whole prompt.
    """
    active = routed.counts > 0
    pairs = routed.decode[1:] & routed.decode[:-1] & (routed.request[1:] == routed.request[:-1])
    shared = (active[1:] & active[:-1])[pairs].sum(axis=-1) / active[1:][pairs].sum(axis=-1)
    return pd.DataFrame({"overlap": shared.mean(axis=0)}).rename_axis("layer")


# Entropy and heatmaps ----------------------------------------------------------------------------


def entropy(weights: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the Shannon entropy in nats of weights normalised over the last axis."""
    total = weights.sum(axis=-1, keepdims=True)
    shares = np.asarray(weights / np.where(total > 0, total, 1), dtype=np.float64)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def entropies(routed: Iterations) -> pd.DataFrame:
    """Return mean entropies by layer.

    `coarse` is that of a request's activation counts. `fine_counts` is that of one decode
    iteration's counts, as the authors' demo takes it, and so ln K by construction; `fine_gate` is
    that of its gate probabilities.
    """
    decoded = routed.at(routed.decode)
    coarse = np.stack([entropy(one.counts.sum(axis=0)) for one in routed.by_request()])
    columns = {
        "coarse": coarse.mean(axis=0),
        "fine_counts": entropy(decoded.counts).mean(axis=0),
        "fine_gate": entropy(decoded.maps).mean(axis=0),
    }
    return pd.DataFrame(columns).rename_axis("layer")


def heatmaps(routed: Iterations) -> pd.DataFrame:
    """Return activation shares of the first request, by layer and expert (figure 3a).

    `coarse` is the request's activation counts over their sum in a layer, `fine` the gate
    probabilities of the decode iteration halfway through it.
    """
    first = next(routed.by_request())
    decoded = first.at(first.decode)
    counts = first.counts.sum(axis=0)
    coarse = counts / counts.sum(axis=1, keepdims=True)
    fine = decoded.maps[len(decoded.maps) // 2]
    index = pd.MultiIndex.from_product([range(n) for n in counts.shape], names=["layer", "expert"])
    return pd.DataFrame({"coarse": coarse.ravel(), "fine": fine.ravel()}, index=index)


# Hit rates, and how they go with similarity ------------------------------------------------------


def hit_rates(predicted: NDArray[np.bool_], activated: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of the activated experts that were predicted, over the last axis."""
    return (predicted & activated).sum(axis=-1) / activated.sum(axis=-1)


def mean_with_interval(
    values: NDArray[np.floating], request: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return the mean of values (N,) and its 95 % interval.

    The bootstrap draws whole requests, since the iterations of one are alike.
    """
    return _bootstrapped(np.stack([values, np.ones_like(values)]), request, _mean)


def correlation(
    x: NDArray[np.floating], y: NDArray[np.floating], request: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return Pearson's coefficient of x and y (N,) and its 95 % interval (figure 9).

    The bootstrap draws whole requests. NaN where x or y does not vary.
    """
    # Centred first, or the sums of squares lose what little the values vary.
    x, y = x - x.mean(), y - y.mean()
    return _bootstrapped(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y]), request, _pearson)


def binned(
    score: NDArray[np.floating], rate: NDArray[np.floating], request: NDArray[np.int64], bins: int
) -> pd.DataFrame:
    """Return mean hit rate and its 95 % interval in equally wide bins of the score (figure 8).

    `score` is the mean of a bin, `count` how many values it holds; empty bins are left out.
    """
    edges = np.linspace(score.min(), score.max(), bins + 1)[1:-1]
    place = np.digitize(score, edges)
    rows = []
    for chosen in (place == number for number in np.unique(place)):
        mean = mean_with_interval(rate[chosen], request[chosen])
        rows.append((score[chosen].mean(), *mean, int(chosen.sum())))
    return pd.DataFrame(rows, columns=["score", "hit_rate", "low", "high", "count"])


def _bootstrapped(
    terms: NDArray[np.floating],
    request: NDArray[np.int64],
    statistic: Callable[[NDArray[np.floating]], NDArray[np.floating]],
) -> tuple[float, float, float]:
    """Return a statistic of sums over terms (M, N), and its 95 % interval over drawn requests."""
    _, position = np.unique(request, return_inverse=True)
    sums = np.stack([np.bincount(position, weights=term) for term in terms])
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(sums.sum(axis=-1)))
        drawn = statistic(sums @ weights(sums.shape[1], "requests")[1:].T)
    low, high = limits(np.concatenate([[value], drawn[np.isfinite(drawn)]]))
    return value, low, high


def _mean(sums: NDArray[np.floating]) -> NDArray[np.floating]:
    total, count = sums
    return total / count


def _pearson(sums: NDArray[np.floating]) -> NDArray[np.floating]:
    n, x, y, xx, yy, xy = sums
    return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
