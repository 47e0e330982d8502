"""What routing traces look like, and how well one can tell the experts of a token d layers ahead.

N counts iterations, L layers, J experts, C stored iterations, h hidden size; entropies are in nats.
Every predictor names K experts a layer, so that all are compared at equal cost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from experiments.bootstrap import limits, weights
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import FloatArray, GateWeights, ModelShape
from finemoe.offload.routed import joined
from finemoe.search import TrajectorySearch, semantic_search
from finemoe.trace import TracedRequest

Values = NDArray[np.floating]
Experts = NDArray[np.bool_]
Predictor = Callable[[int], Experts]
"""From a distance d to the experts predicted for layers d..L-1, shape (N, L - d, J)."""
Comparisons = dict[str, tuple[Values, Values, NDArray[np.int64]]]
"""By search: similarity and hit rate, (N,), and the request of each (N,), or its two (N, 2)."""
POINTS = {"prefill": slice(1), "first_decode": slice(1, 2), "request": slice(None)}
"""Which iterations of a request are its prompt's data point; the paper does not say (4.2.3)."""


class Iterations(NamedTuple):
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
    """Inputs of the MoE blocks for an iteration's last token, shape (N, L, h) or (N, L, 0)."""

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return int(self.request[-1]) + 1

    def at(self, chosen: NDArray[np.bool_]) -> Self:
        """Return the iterations that a mask (N,) chooses."""
        arrays: list[Any] = [array[chosen] for array in self]
        return type(self)(*arrays)

    def by_request(self) -> Iterator[Self]:
        """Yield the iterations of one request after the other."""
        for request in np.unique(self.request):
            yield self.at(self.request == request)


def iterations(requests: Iterable[TracedRequest], hidden_states: bool = True) -> Iterations:
    """Return the iterations of recorded requests, without their hidden states if so asked.

    Raises ValueError if there are none, or if they lack logits, embeddings or hidden states.
    """
    parts = [_of_request(n, request, hidden_states) for n, request in enumerate(requests)]
    if not parts:
        raise ValueError("there is no recorded request to analyse; record at least one")
    return Iterations(*map(np.concatenate, zip(*parts, strict=True)))


def _of_request(number: int, request: TracedRequest, hidden_states: bool) -> Iterations:
    steps = [joined(n, [number], [step], [n]) for n, step in enumerate(request.steps)]
    width = None if hidden_states else 0
    floats = (
        [step.probabilities.mean(axis=1) for step in steps],
        [step.probabilities[:, -1] for step in steps],
        [step.embeddings.mean(axis=0) for step in steps],
        [step.hidden_states[:, -1, :width] for step in steps],
    )
    return Iterations(
        np.full(len(steps), number),
        np.arange(len(steps)) > 0,
        np.stack([step.counts for step in steps]).astype(np.int64),
        *(np.stack(arrays).astype(np.float32) for arrays in floats),
    )


def load_balance(routed: Iterations) -> pd.DataFrame:
    """Return, by layer, the smallest and largest expert's share of the tokens over 1/J."""
    counts = routed.counts.sum(axis=0)
    shares = counts * counts.shape[1] / counts.sum(axis=1, keepdims=True)
    return pd.DataFrame({"smallest": shares.min(axis=1), "largest": shares.max(axis=1)})


def consecutive_overlap(routed: Iterations) -> pd.DataFrame:
    """Return, by layer, the share of a decoded token's experts that its predecessor used as well.

    The first decoded token of a request is left out: its predecessor is a whole prompt.
    """
    active = routed.counts > 0
    pairs = routed.decode[1:] & routed.decode[:-1] & (routed.request[1:] == routed.request[:-1])
    shared = hit_rates(active[:-1], active[1:])[pairs]
    return pd.DataFrame({"overlap": shared.mean(axis=0)})


def entropies(routed: Iterations) -> pd.DataFrame:
    """Return mean entropies by layer.

    `coarse` is that of a request's activation counts. `fine_counts` is that of one decode
    iteration's counts, as the authors' demo takes it, and so ln K by construction; `fine_gate` is
    that of its gate probabilities.
    """
    decoded = routed.at(routed.decode)
    coarse = np.stack([entropy(one.counts.sum(axis=0)) for one in routed.by_request()])
    fine = {"fine_counts": entropy(decoded.counts), "fine_gate": entropy(decoded.maps)}
    return pd.DataFrame(
        {name: one.mean(axis=0) for name, one in {"coarse": coarse, **fine}.items()}
    )


def entropy(weights: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the Shannon entropy in nats of weights normalised over the last axis."""
    total = weights.sum(axis=-1, keepdims=True)
    shares = np.asarray(weights / np.where(total > 0, total, 1), dtype=np.float64)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def mean_with_interval(values: Values, request: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the mean of values (N,) and its 95 % interval.

    The bootstrap draws whole requests, since the iterations of one are alike.
    """
    return _bootstrapped([values, np.ones_like(values)], request, lambda sums: sums[0] / sums[1])


def correlation(x: Values, y: Values, request: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return Pearson's coefficient of x and y (N,) and its 95 % interval (figure 9).

    The bootstrap draws whole requests; `request` is (N,), or (N, 2) where values are of pairs. NaN
    where x or y does not vary.
    """
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
    """Return mean hit rate and its 95 % interval in equally wide bins of the score (figure 8).

    `score` is the mean of a bin, `count` how many values it holds; empty bins are left out.
    """
    edges = np.linspace(score.min(), score.max(), bins + 1)[1:-1]
    number = np.digitize(score, edges)
    rows = []
    for chosen in (number == n for n in np.unique(number)):
        mean = mean_with_interval(rate[chosen], request[chosen])
        rows.append((score[chosen].mean(), *mean, int(chosen.sum())))
    return pd.DataFrame(rows, columns=["score", "hit_rate", "low", "high", "count"])


class Searched(NamedTuple):
    """What a filled store answers to the decode iterations of the measured requests.

    The best stored iteration and its cosine, by embedding (N,), and by trajectory, after the gate
    of each layer by the rows up to it (L, N).
    """

    store: ExpertMapStore
    semantic: NDArray[np.intp]
    semantic_scores: NDArray[np.float64]
    trajectory: NDArray[np.intp]
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
    return Searched(store, *semantic_search(store, queries.embeddings), entries, scores)


def predictors(
    history: Iterations,
    measured: Iterations,
    searched: Searched,
    gates: GateWeights | None,
    top_k: int,
) -> dict[str, Predictor]:
    """Return the predictors by name; without gates there is none that applies them."""
    named = {
        "popularity": popularity(history, measured, top_k),
        "request counts": request_counts(history, measured, top_k),
        "previous token": previous_token(measured, top_k),
        "map, semantic": semantic_map(searched, top_k),
        "map, trajectory": trajectory_map(searched, top_k),
    }
    return named if gates is None else {**named, "target gate": target_gate(gates, measured, top_k)}


def popularity(history: Iterations, measured: Iterations, top_k: int) -> Predictor:
    """Predict a layer's experts that the history used most."""
    popular = top_experts(history.counts.sum(axis=0), top_k)
    everywhere = np.broadcast_to(popular, (int(measured.decode.sum()), *popular.shape))
    return lambda distance: everywhere[:, distance:]


def request_counts(history: Iterations, measured: Iterations, top_k: int) -> Predictor:
    """Predict by the past request whose activation counts are nearest, as MoE-Infinity does.

    The cosine is between the whole counts of a past request and those of the current one up to
    layer l - d of the current iteration, its prefill included.
    """
    past = np.stack([one.counts.sum(axis=0) for one in history.by_request()]).astype(np.float64)
    before = [one.counts.cumsum(axis=0) - one.counts for one in measured.by_request()]
    earlier = np.concatenate(before)[measured.decode]
    now = measured.counts[measured.decode].swapaxes(0, 1).astype(np.float64)
    dots = (now @ past.transpose(1, 2, 0)).cumsum(axis=0)
    dots += earlier.reshape(len(earlier), -1) @ past.reshape(len(past), -1).T
    nearest = (dots / np.sqrt((past * past).sum(axis=(1, 2)))).argmax(axis=-1)
    return _looked_up(top_experts(past, top_k), nearest)


def previous_token(measured: Iterations, top_k: int) -> Predictor:
    """Predict what the request's previous token used; for the first decode, the prompt's last."""
    used = top_experts(measured.last, top_k)[np.flatnonzero(measured.decode) - 1]
    return lambda distance: used[:, distance:]


def target_gate(gates: GateWeights, measured: Iterations, top_k: int) -> Predictor:
    """Predict by giving the hidden state of layer l - d to the gate of layer l (speculation)."""
    states = measured.hidden_states[measured.decode]

    def predict(distance: int) -> Experts:
        layers = range(distance, states.shape[1])
        logits = [gates.logits(layer, states[:, layer - distance]) for layer in layers]
        return top_experts(np.stack(logits, axis=1), top_k)

    return predict


def semantic_map(searched: Searched, top_k: int) -> Predictor:
    """Predict all layers by the stored iteration of the most similar embedding (4.2.1)."""
    chosen = _stored_experts(searched.store, top_k)[searched.semantic]
    return lambda distance: chosen[:, distance:]


def trajectory_map(searched: Searched, top_k: int) -> Predictor:
    """Predict layer l by the stored iteration most similar up to layer l - d (4.2.2)."""
    return _looked_up(_stored_experts(searched.store, top_k), searched.trajectory)


def top_experts(scores: Values | NDArray[np.signedinteger], top_k: int) -> Experts:
    """Return where the `top_k` largest scores of the last axis are; the first of equals wins."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def _stored_experts(store: ExpertMapStore, top_k: int) -> Experts:
    return top_experts(np.stack([store.expert_map(n) for n in range(store.size)]), top_k)


def _looked_up(known: Experts, entries: NDArray[np.intp]) -> Predictor:
    """Predict layer l by `known` (C, L, J) at the entry (L, N) found after layer l - d."""

    def predict(distance: int) -> Experts:
        layers = np.arange(distance, known.shape[1])
        chosen: Experts = known[entries[: len(layers)].T, layers]
        return chosen

    return predict


def hit_rates(predicted: Experts, activated: Experts) -> NDArray[np.float64]:
    """Return the share of the activated experts that were predicted, over the last axis."""
    return (predicted & activated).sum(axis=-1) / activated.sum(axis=-1)


def hit_rates_by_distance(
    named: Mapping[str, Predictor], measured: Iterations, distances: range
) -> pd.DataFrame:
    """Return predictor, distance, hit rate and its 95 % interval (figure 4).

    The hit rate is the mean, over decode iterations and layers d..L-1, of the share of the
    activated experts that were predicted. Distances that leave no layer are skipped.
    """
    queries = measured.at(measured.decode)
    activated = queries.counts > 0
    rows = []
    for name, predict in named.items():
        for distance in range(distances.start, min(distances.stop, activated.shape[1])):
            hits = hit_rates(predict(distance), activated[:, distance:]).mean(axis=1)
            rows.append((name, distance, *mean_with_interval(hits, queries.request)))
    return pd.DataFrame(rows, columns=["predictor", "distance", "hit_rate", "low", "high"])


def compared_prompts(routed: Iterations, point: str, top_k: int) -> Comparisons:
    """Return all pairs of prompts, each of them one data point, as the paper's figures 8 and 9 do.

    A point is an embedding and a map, means over the iterations that `point`, one of POINTS, says.
    Similarity is the cosine of the embeddings or of the whole maps; the hit rate is the share that
    two maps have in common of their K likeliest experts, mean over layers, so it is symmetric.
    """
    own = POINTS[point]
    requests = [one for one in routed.by_request() if len(one.request[own])]
    embeddings = np.stack([one.embeddings[own].mean(axis=0) for one in requests])
    maps = np.stack([one.maps[own].mean(axis=0) for one in requests])
    chosen = top_experts(maps, top_k)
    first, second = np.triu_indices(len(requests), 1)
    hits = hit_rates(chosen[first], chosen[second]).mean(axis=1)
    pairs = np.stack([first, second], axis=1)
    by_search = {"semantic": embeddings, "trajectory": maps.reshape(len(maps), -1)}
    return {name: (1 - pdist(points, "cosine"), hits, pairs) for name, points in by_search.items()}


def compared_matches(
    searched: Searched, measured: Iterations, top_k: int, distance: int
) -> Comparisons:
    """Return each decode iteration and its best match in the store (figures 8, 9).

    A semantic match is judged over all layers, a trajectory `distance` layers after each score. The
    K likeliest experts of the matched map count as predicted; rates are means over layers.
    """
    queries, scores = measured.at(measured.decode), searched.scores(distance)
    predicted = {
        "semantic": semantic_map(searched, top_k)(0),
        "trajectory": trajectory_map(searched, top_k)(distance),
    }
    compared: Comparisons = {}
    for search, chosen in predicted.items():
        activated = queries.counts[:, -chosen.shape[1] :] > 0
        compared[search] = (
            scores[search],
            hit_rates(chosen, activated).mean(axis=1),
            queries.request,
        )
    return compared
