"""Predictions in FineMoE's searcher: what they ask for, and that nothing else tells them apart."""

import numpy as np
import pytest

from baselines.in_searcher import HitCountInSearcher, in_searcher
from finemoe.offload.policy import FloatArray, Gate, GateWeights, ModelShape
from tests.finemoe.offload.states import DECODE, asked, decode

SHAPE = ModelShape(layers=4, experts=4, top_k=2, hidden_size=2)
EMBEDDINGS = np.zeros((1, 2), np.float32)
# Rows are layers: tokens of a finished request by expert.
FIRST = np.array([[4, 4, 0, 0], [0, 4, 4, 0], [5, 2, 1, 0], [0, 1, 3, 4]], np.float32)
SECOND = np.array([[0, 0, 8, 8], [8, 0, 0, 8], [4, 4, 2, 6], [8, 4, 4, 0]], np.float32)


def gate(layer: int, *pairs: tuple[int, int], inputs: FloatArray | None = None) -> Gate:
    """Return a gate whose tokens go to these two experts each."""
    probabilities = np.full((len(pairs), 4), 0.1, np.float32)
    for row, pair in zip(probabilities, pairs, strict=True):
        row[[*pair]] = 0.4
    return Gate(layer, probabilities, tuple(sorted({e for pair in pairs for e in pair})), inputs)


def test_the_later_gate_guesses_for_its_layer_alone() -> None:
    policy = in_searcher(SHAPE, "speculation", 2)
    weight = np.zeros((4, 4, 2), np.float32)
    weight[2] = np.log([[4, 1], [3, 1], [2, 1], [1, 10]])
    assert policy.set_gates
    policy.set_gates(GateWeights(weight))
    assert policy.on_embeddings(DECODE, EMBEDDINGS) is None
    first, second = [1.0, 0.0], [0.0, 1.0]
    spoken = gate(0, (2, 3), inputs=np.array([first], np.float32))
    # Softmax (.4, .3, .2, .1), two layers ahead.
    assert asked(policy.on_gate(DECODE, spoken)) == pytest.approx({(2, 0): 0.2, (2, 1): 0.15})
    # The other token's is (1, 1, 1, 10) / 13; each asks for two, and the surer one counts.
    spoken = gate(0, (2, 3), (2, 3), inputs=np.array([first, second], np.float32))
    both = {(2, 0): 0.2, (2, 1): 0.15, (2, 3): 5 / 13}
    assert asked(policy.on_gate(DECODE, spoken)) == pytest.approx(both)
    for layer in (2, 3):
        assert policy.on_gate(DECODE, gate(layer, (0, 1), inputs=EMBEDDINGS)) is None


def hit_count(distance: int, *stored: FloatArray) -> HitCountInSearcher:
    policy = in_searcher(SHAPE, "hit_count", distance)
    assert isinstance(policy, HitCountInSearcher)
    for matrix in stored:
        policy.collection.add(matrix)
    return policy


def test_the_nearest_matrix_answers_for_layer_l_plus_d_alone() -> None:
    policy = hit_count(2, SECOND, FIRST)
    policy.on_embeddings(DECODE, EMBEDDINGS)
    # The first matrix; K of its ratios 5/8, 2/8, 1/8 two layers ahead, then of 4/8, 3/8, 1/8.
    assert asked(policy.on_gate(DECODE, gate(0, (0, 1)))) == {(2, 0): 5 / 16, (2, 1): 2 / 16}
    assert asked(policy.on_gate(DECODE, gate(1, (1, 2)))) == {(3, 3): 4 / 16, (3, 2): 3 / 16}
    for layer in (2, 3):
        assert asked(policy.on_gate(DECODE, gate(layer, (0, 1)))) == {}


def test_each_request_asks_for_k_experts() -> None:
    policy, both = hit_count(1, FIRST, SECOND), decode(0, 0, 1)
    policy.on_embeddings(both, np.zeros((2, 2), np.float32))
    policy.on_gate(both, gate(0, (0, 1), (2, 3)))
    # (5, 2, 1, 0) / 8 and (4, 4, 2, 6) / 16: the first asks for 0 and 1, the second for 3 and 0.
    wanted = asked(policy.on_gate(both, gate(1, (1, 2), (0, 3))))
    assert wanted == {(2, 0): 5 / 8, (2, 1): 2 / 8, (2, 3): 6 / 16}


def test_popular_experts_are_asked_for_below_layer_d() -> None:
    popular = asked(hit_count(2, FIRST, SECOND).on_embeddings(DECODE, EMBEDDINGS))
    # Of 24 tokens 8 went to each of experts 2 and 3; then 8, 4, 4, 8, two layers after -1.
    assert popular == pytest.approx({(0, 2): 1 / 3, (0, 3): 1 / 3, (1, 0): 1 / 6, (1, 3): 1 / 6})
    assert asked(hit_count(2).on_embeddings(DECODE, EMBEDDINGS)) == {}
