"""Predictors on toy traces of two layers and three experts, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from experiments.figures.routing_analysis import Iterations, iterations
from experiments.figures.routing_predictors import (
    Predictor,
    Searched,
    hit_rates_by_distance,
    popularity,
    predictors,
    previous_token,
    request_counts,
    search,
    similarity_and_hits,
    target_gate,
    top_experts,
    trajectory_map,
)
from finemoe.offload.policy import GateWeights, ModelShape
from tests.experiments.figures.test_routing_analysis import EXPERTS, REQUESTS, request

SHAPE = ModelShape(layers=2, experts=EXPERTS, top_k=1, hidden_size=EXPERTS)
GATES = GateWeights(np.stack([np.eye(EXPERTS, dtype=np.float32)] * 2))
"""Gates that say of a hidden state what it says itself: a toy's hidden states are its logits."""


def split() -> tuple[Iterations, Iterations]:
    """Return the first toy request as history, the second as measured."""
    routed = iterations(REQUESTS)
    return routed.at(routed.request == 0), routed.at(routed.request == 1)


def predicted(predictor: Predictor, distance: int) -> list[list[int]]:
    """Return the one expert predicted for each iteration and layer."""
    found = predictor(distance)
    assert (found.sum(axis=-1) == 1).all()
    choices: list[list[int]] = found.argmax(axis=-1).tolist()
    return choices


def searched(history: Iterations, measured: Iterations) -> Searched:
    return search(history, measured, SHAPE, capacity=10, distance=1)


def test_popularity_is_the_historys() -> None:
    history, measured = split()
    assert predicted(popularity(history, measured, 1), 0) == [[0, 2]] * 2
    assert predicted(popularity(history, measured, 1), 1) == [[2]] * 2


def test_previous_token_starts_with_the_prompts_last() -> None:
    history, measured = split()
    assert predicted(previous_token(measured, 1), 0) == [[2, 0], [1, 0]]
    assert predicted(previous_token(history, 1), 0) == [[0, 1], [0, 2]]


def test_the_target_gate_sees_the_state_some_layers_earlier() -> None:
    _, measured = split()
    assert predicted(target_gate(GATES, measured, 1), 0) == [[1, 0]] * 2
    assert predicted(target_gate(GATES, measured, 1), 1) == [[1]] * 2


def test_request_counts_change_their_mind_as_the_request_goes_on() -> None:
    # Past counts: A = 4 0 0 | 0 0 4 and B = 0 4 0 | 4 0 0. The prompt (0 | 2) is A's, the second
    # token (1 | 0) half of either, the third (1 | 0) tips the scales, but only once it is seen.
    past_a = request(0, [[0, 0], [2, 2]], [[0], [2]], [[0], [2]])
    past_b = request(1, [[1, 1], [0, 0]], [[1], [0]], [[1], [0]])
    now = request(0, [[0], [2]], [[1], [0]], [[1], [0]], [[1], [0]])
    predictor = request_counts(iterations([past_a, past_b]), iterations([now]), 1)
    # Layer 1 at distance 1: seen are the tokens before and layer 0 of this one.
    # A's : B's matching choices are 2 : 1, then 2 : 3, then 2 : 5.
    assert predicted(predictor, 1) == [[2], [0], [0]]
    # Layer 0 at distance 0 knows as much; layer 1 at distance 0 has 2 : 2 first, and A is first.
    assert predicted(predictor, 0) == [[0, 2], [1, 0], [1, 0]]


def test_maps_by_embedding_and_by_trajectory() -> None:
    # Embedding and layer 0 of the query are both nearest to what the history's second token did.
    history, measured = split()
    named = predictors(history, measured, searched(history, measured), GATES, 1)
    assert predicted(named["map, semantic"], 1) == [[2], [2]]
    assert predicted(named["map, trajectory"], 1) == [[2], [2]]
    assert len(named) == 6
    assert len(predictors(history, measured, searched(history, measured), None, 1)) == 5


def test_a_trajectory_is_known_only_up_to_the_layer_that_ran() -> None:
    # Stored: 1 | 1, then 0 | 2. The query 0 | 1 looks like the second after layer 0; after layer 1
    # both are as near, and the first wins.
    history = iterations([request(0, [[1], [1]], [[0], [2]])])
    measured = iterations([request(0, [[2], [0]], [[0], [1]])])
    predictor = trajectory_map(searched(history, measured), 1)
    assert predicted(predictor, 1) == [[2]]
    assert predicted(predictor, 0) == [[0, 1]]


def test_hit_rates_by_distance() -> None:
    history, measured = split()
    named = {"popularity": popularity(history, measured, 1), "last": previous_token(measured, 1)}
    rates = hit_rates_by_distance(named, measured, range(5))
    found = {(row.predictor, row.distance): row.hit_rate for row in rates.itertuples()}
    # The measured request decodes 1 | 0 twice; distances of two and more leave no layer.
    assert found == {
        ("popularity", 0): 0.0,
        ("popularity", 1): 0.0,
        ("last", 0): 0.75,
        ("last", 1): 1.0,
    }


def test_what_has_been_seen_before_is_found_again() -> None:
    _, measured = split()
    found = searched(measured, measured)
    np.testing.assert_allclose(found.semantic.scores, 1, rtol=1e-6)
    np.testing.assert_allclose(found.trajectory.scores, 1, rtol=1e-6)
    pairs = similarity_and_hits(found, measured, 1, distance=1)
    assert pairs["search"].tolist() == ["semantic"] * 2 + ["trajectory"] * 2
    np.testing.assert_allclose(pairs["hit_rate"], 1)


def test_a_match_is_judged_by_what_it_says_of_the_layers_ahead() -> None:
    # By embedding the past iteration is at right angles; both layers of it say something else.
    history = iterations([request(0, [[0, 0], [1, 1]], [[0], [1]])])
    measured = iterations([request(0, [[2], [1]], [[2], [1]])])
    pairs = similarity_and_hits(searched(history, measured), measured, 1, distance=1)
    semantic, trajectory = pairs[["score", "hit_rate"]].to_numpy()
    assert semantic.tolist() == [0, 0.5]
    # After layer 0 gates (1/2 1/4 1/4) and (1/4 1/4 1/2) have a cosine of 5/6; layer 1 is hit.
    assert trajectory.tolist() == pytest.approx([5 / 6, 1])


SCORES = arrays(np.float32, (3, 6), elements=st.floats(-10, 10, width=32))


@given(SCORES, st.integers(1, 6))
def test_the_chosen_are_the_largest(scores: NDArray[np.float32], top_k: int) -> None:
    chosen = top_experts(scores, top_k)
    assert (chosen.sum(axis=-1) == top_k).all()
    for row, taken in zip(scores, chosen, strict=True):
        assert taken.all() or row[taken].min() >= row[~taken].max()


CHOICES = st.lists(
    st.tuples(*[st.integers(0, EXPERTS - 1)] * 2), min_size=2, max_size=5
)  # one (layer 0, layer 1) a decoded token


@given(st.lists(CHOICES, min_size=2, max_size=4))
def test_hit_rates_are_shares_and_ordered(drawn: list[list[tuple[int, int]]]) -> None:
    requests = [
        request(n, *[[[first], [second]] for first, second in tokens])
        for n, tokens in enumerate(drawn)
    ]
    routed = iterations(requests)
    history, measured = routed.at(routed.request == 0), routed.at(routed.request > 0)
    named = predictors(history, measured, searched(history, measured), GATES, 1)
    rates = hit_rates_by_distance(named, measured, range(1, 3))
    assert set(rates["distance"]) == {1}
    assert rates["hit_rate"].between(0, 1).all()
    assert (rates["low"] <= rates["hit_rate"] + 1e-9).all()
    assert (rates["high"] >= rates["hit_rate"] - 1e-9).all()
