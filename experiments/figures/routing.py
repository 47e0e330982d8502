"""How well one can tell the experts of a token d layers ahead, at K experts a layer.

N counts iterations, L layers, J experts, C stored iterations, h hidden size; entropies are in nats.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from experiments.bootstrap import limits, weights
from finemoe.expert_map import ExpertMapStore, TrajectorySearch, nearest
from finemoe.offload.policy import FloatArray, ModelShape
from finemoe.offload.routed import joined
from finemoe.selection import top_experts
from finemoe.trace import TracedRequest

Values = NDArray[np.floating]
Experts = NDArray[np.bool_]
Predictor = Callable[[int], Experts]  # of d; the experts of layers d..L-1, (N, L - d, J)
# Similarity and hit rate, (N,), and the request of each (N,), or its two (N, 2).
Comparison = tuple[Values, Values, NDArray[np.int64]]
# Which iterations of a request are its prompt's data point; the paper does not say (4.2.3).
POINTS = {"prefill": slice(1), "first_decode": slice(1, 2), "request": slice(None)}


class Iterations(NamedTuple):
    """Every iteration of some requests, request after request; each begins with its prefill."""

    request: NDArray[np.int64]  # position of an iteration's request, shape (N,)
    decode: NDArray[np.bool_]  # whether an iteration decodes one token, shape (N,)
    counts: NDArray[np.int64]  # tokens that go to each expert, shape (N, L, J)
    maps: FloatArray  # gate probabilities, shape (N, L, J), in a prefill the mean over its tokens
    embeddings: FloatArray  # shape (N, h), in a prefill the mean over its tokens

    @property
    def requests(self) -> int:
        return int(self.request[-1]) + 1

    def at(self, chosen: NDArray[np.bool_]) -> Self:
        """Return the iterations that a mask (N,) chooses."""
        arrays: list[Any] = [array[chosen] for array in self]
        return type(self)(*arrays)

    def by_request(self) -> Iterator[Self]:
        """Yield the iterations of one request after the other."""
        for request in np.unique(self.request):
            yield self.at(self.request == request)


def iterations(requests: Iterable[TracedRequest]) -> Iterations:
    """Return the iterations of requests; ValueError for none, or without logits or embeddings."""
    parts = []
    for number, request in enumerate(requests):
        steps = [joined(n, [number], [step], [n]) for n, step in enumerate(request.steps)]
        maps = np.stack([step.probabilities.mean(axis=1) for step in steps])
        parts.append(
            (
                np.full(len(steps), number),
                np.arange(len(steps)) > 0,
                np.stack([step.counts for step in steps]).astype(np.int64),
                maps.astype(np.float32),
                np.stack([step.embeddings.mean(axis=0) for step in steps]).astype(np.float32),
            )
        )
    if not parts:
        raise ValueError("there is no recorded request to analyse; record at least one")
    return Iterations(*map(np.concatenate, zip(*parts, strict=True)))


def entropy(weights: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the Shannon entropy in nats of weights normalised over the last axis."""
    total = weights.sum(axis=-1, keepdims=True)
    shares = np.asarray(weights / np.where(total > 0, total, 1), dtype=np.float64)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def mean_with_interval(values: Values, request: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the mean of values (N,) and its 95 % interval; the bootstrap draws whole requests."""
    return _bootstrapped([values, np.ones_like(values)], request, lambda sums: sums[0] / sums[1])


def correlation(x: Values, y: Values, request: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return Pearson's coefficient (figure 9) and its 95 % interval; NaN where nothing varies."""
    # Centred first, or the sums of squares lose what little the values vary.
    x, y = x - x.mean(), y - y.mean()
    return _bootstrapped([np.ones_like(x), x, y, x * x, y * y, x * y], request, _pearson)


def _pearson(sums: Values) -> Values:
    n, x, y, xx, yy, xy = sums
    return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def _bootstrapped(
    terms: list[Values], request: NDArray[np.int64], statistic: Callable[[Values], Values]
) -> tuple[float, float, float]:
    """Return a statistic of sums over terms (N,), and its 95 % interval over drawn requests."""
    units, position = np.unique(request, return_inverse=True)
    counts = weights(len(units), "requests")[1:]
    if request.ndim == 2:
        # A pair counts as often as both of its requests are drawn, a request with itself never.
        pairs = np.zeros((len(terms), len(units), len(units)))
        pairs[:, *position.reshape(request.shape).T] = terms
        resampled, sums = (counts @ pairs * counts).sum(axis=-1), pairs.sum(axis=-1)
    else:
        sums = np.stack([np.bincount(position, weights=term) for term in terms])
        resampled = sums @ counts.T
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(sums.sum(axis=-1)))
        drawn = statistic(resampled)
    low, high = limits(np.concatenate([[value], drawn[np.isfinite(drawn)]]))
    return value, low, high


def binned(score: Values, rate: Values, request: NDArray[np.int64], bins: int) -> pd.DataFrame:
    """Return mean score, mean hit rate and its interval in equally wide bins (figure 8)."""
    edges = np.linspace(score.min(), score.max(), bins + 1)[1:-1]
    number = np.digitize(score, edges)
    rows = []
    for chosen in (number == n for n in np.unique(number)):
        mean = mean_with_interval(rate[chosen], request[chosen])
        rows.append((score[chosen].mean(), *mean, int(chosen.sum())))
    return pd.DataFrame(rows, columns=["score", "hit_rate", "low", "high", "count"])


class Searched(NamedTuple):
    """What a store answers to N decode iterations: the best entries and their cosines."""

    store: ExpertMapStore
    semantic: NDArray[np.intp]  # by embedding, shape (N,)
    semantic_scores: NDArray[np.float64]
    trajectory: NDArray[np.intp]  # after the gate of each layer, shape (L, N)
    trajectory_scores: NDArray[np.float64]

    def scores(self, distance: int) -> dict[str, NDArray[np.float64]]:
        """Return scores (N,) by search; a trajectory's are means over layers 0..L-1-d."""
        ahead = self.trajectory_scores[: len(self.trajectory) - distance]
        return {"semantic": self.semantic_scores, "trajectory": ahead.mean(axis=0)}


def search(
    history: Iterations, measured: Iterations, shape: ModelShape, capacity: int, distance: int
) -> Searched:
    """Fill a store of `capacity` with the history, prefills included, and search it."""
    store = ExpertMapStore(shape, capacity, distance)
    for expert_map, embedding in zip(history.maps, history.embeddings, strict=True):
        store.add(expert_map, embedding)
    queries = measured.at(measured.decode)
    trajectory = TrajectorySearch(store, len(queries.maps))
    rows = queries.maps.swapaxes(0, 1)
    by_map = [trajectory.observe(layer[None]) for layer in rows]
    entries, scores = (np.concatenate(parts) for parts in zip(*by_map, strict=True))
    return Searched(store, *nearest(store.cosines(queries.embeddings)), entries, scores)


def request_counts(history: Iterations, measured: Iterations, top_k: int) -> Predictor:
    """Predict by the past request of nearest activation counts, as MoE-Infinity does."""
    past = np.stack([one.counts.sum(axis=0) for one in history.by_request()]).astype(np.float64)
    before = [one.counts.cumsum(axis=0) - one.counts for one in measured.by_request()]
    earlier = np.concatenate(before)[measured.decode]
    now = measured.counts[measured.decode].swapaxes(0, 1).astype(np.float64)
    dots = (now @ past.transpose(1, 2, 0)).cumsum(axis=0)
    dots += earlier.reshape(len(earlier), -1) @ past.reshape(len(past), -1).T
    nearest = (dots / np.sqrt((past * past).sum(axis=(1, 2)))).argmax(axis=-1)
    return partial(_looked_up, top_experts(past, top_k), nearest)


def trajectory_map(searched: Searched, top_k: int) -> Predictor:
    """Predict layer l by the stored iteration most similar up to layer l - d (4.2.2)."""
    return partial(_looked_up, _stored_experts(searched.store, top_k), searched.trajectory)


def _looked_up(known: Experts, entries: NDArray[np.intp], distance: int) -> Experts:
    """Predict layer l by `known` (C, L, J) at the entry (L, N) found after layer l - d."""
    layers = np.arange(distance, known.shape[1])
    return np.asarray(known[entries[: len(layers)].T, layers])


def _stored_experts(store: ExpertMapStore, top_k: int) -> Experts:
    return top_experts(np.stack([store.expert_map(n) for n in range(store.size)]), top_k)


def hit_rates(predicted: Experts, activated: Experts) -> NDArray[np.float64]:
    """Return the share of the activated experts that were predicted, mean over layers."""
    return ((predicted & activated).sum(axis=-1) / activated.sum(axis=-1)).mean(axis=1)


def compared_prompts(routed: Iterations, point: str, top_k: int) -> dict[str, Comparison]:
    """Return all pairs of prompts, each a data point by `point` of POINTS (figures 8, 9)."""
    own = POINTS[point]
    requests = [one for one in routed.by_request() if len(one.request[own])]
    embeddings = np.stack([one.embeddings[own].mean(axis=0) for one in requests])
    maps = np.stack([one.maps[own].mean(axis=0) for one in requests])
    chosen = top_experts(maps, top_k)
    first, second = np.triu_indices(len(requests), 1)
    hits = hit_rates(chosen[first], chosen[second])
    pairs = np.stack([first, second], axis=1)
    by_search = {"semantic": embeddings, "trajectory": maps.reshape(len(maps), -1)}
    return {name: (1 - pdist(points, "cosine"), hits, pairs) for name, points in by_search.items()}


def compared_matches(
    searched: Searched, measured: Iterations, top_k: int, distance: int
) -> dict[str, Comparison]:
    """Return each decode iteration and its best match in the store (figures 8, 9)."""
    queries, scores = measured.at(measured.decode), searched.scores(distance)
    predicted = {
        "semantic": _stored_experts(searched.store, top_k)[searched.semantic],
        "trajectory": trajectory_map(searched, top_k)(distance),
    }
    activated = queries.counts > 0
    rates = {name: hit_rates(one, activated[:, -one.shape[1] :]) for name, one in predicted.items()}
    return {name: (scores[name], rate, queries.request) for name, rate in rates.items()}
