"""How well one can tell, d layers ahead, which experts a decoded token will use.

Figures 4, 8, 9 and 16a of the paper. Every predictor names K experts a layer, so that all are
compared at equal cost. N counts decode iterations, L layers, J experts, C stored iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.figures.routing_analysis import Iterations, hit_rates, mean_with_interval
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import GateWeights, ModelShape
from finemoe.search import Match, TrajectorySearch, semantic_search

Experts = NDArray[np.bool_]
Predictor = Callable[[int], Experts]
"""From a distance d to the experts predicted for layers d..L-1, shape (N, L - d, J)."""


def top_experts(scores: NDArray[np.floating] | NDArray[np.signedinteger], top_k: int) -> Experts:
    """Return where the `top_k` largest scores of the last axis are; the first of equals wins."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


# Searching the store ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """The best stored iteration and its cosine, for every query."""

    entries: NDArray[np.intp]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Searched:
    """What a filled store answers to the decode iterations of the measured requests."""

    store: ExpertMapStore
    semantic: Matches
    """By embedding, shape (N,)."""
    trajectory: Matches
    """After the gate of each layer, by the rows up to it, shape (L, N)."""


def search(
    history: Iterations, measured: Iterations, shape: ModelShape, capacity: int, distance: int
) -> Searched:
    """Fill a store of `capacity` with the history, prefills included, and search it."""
    store = ExpertMapStore(shape, capacity, distance)
    for expert_map, embedding in zip(history.maps, history.embeddings, strict=True):
        store.add(expert_map, embedding)
    queries = measured.at(measured.decode)
    trajectory = TrajectorySearch(store, len(queries.maps))
    observed = [trajectory.observe(queries.maps[:, layer]) for layer in range(shape.layers)]
    return Searched(
        store, _matches([semantic_search(store, queries.embeddings)], flat=True), _matches(observed)
    )


def _matches(found: list[list[Match]], flat: bool = False) -> Matches:
    pairs = np.array(found[0] if flat else found, dtype=np.float64)
    return Matches(pairs[..., 0].astype(np.intp), pairs[..., 1])


# Predictors -------------------------------------------------------------------------------------


def predictors(
    history: Iterations,
    measured: Iterations,
    searched: Searched,
    gates: GateWeights | None,
    top_k: int,
) -> dict[str, Predictor]:
    """Return the predictors by name; without gates there is none that applies them."""
    found = {
        "popularity": popularity(history, measured, top_k),
        "request counts": request_counts(history, measured, top_k),
        "previous token": previous_token(measured, top_k),
        "map, semantic": semantic_map(searched, top_k),
        "map, trajectory": trajectory_map(searched, top_k),
    }
    if gates is not None:
        found["target gate"] = target_gate(gates, measured, top_k)
    return found


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
    earlier = np.concatenate(
        [one.counts.cumsum(axis=0) - one.counts for one in measured.by_request()]
    )[measured.decode]
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
    found = _stored_experts(searched.store, top_k)[searched.semantic.entries]
    return lambda distance: found[:, distance:]


def trajectory_map(searched: Searched, top_k: int) -> Predictor:
    """Predict layer l by the stored iteration most similar up to layer l - d (4.2.2)."""
    return _looked_up(_stored_experts(searched.store, top_k), searched.trajectory.entries)


def _stored_experts(store: ExpertMapStore, top_k: int) -> Experts:
    return top_experts(np.stack([store.expert_map(n) for n in range(store.size)]), top_k)


def _looked_up(known: Experts, entries: NDArray[np.intp]) -> Predictor:
    """Predict layer l by `known` (C, L, J) at the entry (L, N) found after layer l - d."""

    def predict(distance: int) -> Experts:
        layers = np.arange(distance, known.shape[1])
        found: Experts = known[entries[: len(layers)].T, layers]
        return found

    return predict


# Hit rates --------------------------------------------------------------------------------------


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
        for distance in distances:
            if distance >= activated.shape[1]:
                break
            hits = hit_rates(predict(distance), activated[:, distance:]).mean(axis=1)
            rows.append((name, distance, *mean_with_interval(hits, queries.request)))
    return pd.DataFrame(rows, columns=["predictor", "distance", "hit_rate", "low", "high"])


def similarity_and_hits(
    searched: Searched, measured: Iterations, top_k: int, distance: int
) -> pd.DataFrame:
    """Return score and hit rate of every decode iteration with its best matches (figures 8, 9).

    Semantic: one match an iteration, judged over all layers. Trajectory: scores after layers
    0..L-1-d, judged d layers later; both means over layers. The K likeliest experts of the matched
    map count as predicted.
    """
    queries = measured.at(measured.decode)
    ahead = min(distance, queries.counts.shape[1] - 1)
    trajectory = searched.trajectory.scores[: queries.counts.shape[1] - ahead].mean(axis=0)
    frames = []
    for kind, score, chosen in (
        ("semantic", searched.semantic.scores, semantic_map(searched, top_k)(0)),
        ("trajectory", trajectory, trajectory_map(searched, top_k)(ahead)),
    ):
        activated = queries.counts[:, -chosen.shape[1] :] > 0
        hits = hit_rates(chosen, activated).mean(axis=1)
        columns = {"request": queries.request, "search": kind, "score": score, "hit_rate": hits}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
