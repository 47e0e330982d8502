"""What is asked for one layer ahead: by its gate's guess, or as DeepSpeed does, all of it."""

import numpy as np
import pytest

from baselines.deepspeed import DeepSpeedPolicy
from baselines.least_stale import LeastStalePolicy
from baselines.mixtral_offload import MixtralOffloadPolicy
from baselines.speculation import SpeculatingPolicy, likeliest
from finemoe.offload.policy import SMALLEST_PRIORITY, GateWeights, ModelShape
from tests.finemoe.offload.states import DECODE, asked, gate

SMALL = ModelShape(layers=3, experts=4, top_k=2, hidden_size=2)
WEIGHT = np.zeros((3, 4, 2), np.float32)
WEIGHT[1] = [[1, 0], [0, 1], [-1, 0], [0, -1]]


def test_layers_are_ranked_one_by_one_and_equal_scores_by_index() -> None:
    scores = np.zeros((2, 2, 4), np.float32)
    scores[1, :, 3] = 200
    # The second layer's other experts have probability 0, and one of them is chosen all the same.
    assert likeliest(scores, 2).tolist() == [[0.25, 0.25, 0, 0], [SMALLEST_PRIORITY, 0, 0, 1]]


@pytest.mark.parametrize("kind", [MixtralOffloadPolicy, LeastStalePolicy])
def test_the_next_layers_gate_is_applied_to_this_layers_input(
    kind: type[SpeculatingPolicy],
) -> None:
    policy = kind(SMALL)  # type: ignore[call-arg]
    assert policy.placement.awaited == (kind is MixtralOffloadPolicy)
    policy.set_gates(GateWeights(WEIGHT))
    here = gate(0, (0.25,) * 4, hidden=[[2, 1]])
    # Logits 2, 1, -2, -1 at layer 1.
    assert set(asked(policy.on_gate(DECODE, here))) == {(1, 0), (1, 1)}
    biased = GateWeights(WEIGHT, np.array([[0] * 4, [0, 0, 9, 0], [0] * 4], np.float32))
    policy.set_gates(biased)
    assert set(asked(policy.on_gate(DECODE, here))) == {(1, 2), (1, 0)}
    assert policy.on_gate(DECODE, here._replace(layer=2)) is None


def test_at_most_so_many_experts_a_layer_are_asked_for_whatever_the_tokens() -> None:
    here = gate(0, (0.25,) * 4, (0.25,) * 4, hidden=[[2, 1], [-1, -3]])
    # Logits (2, 1, -2, -1) and (-1, -3, 1, 3): the second token's expert 3 is the surest, then 0.
    for most, expected in ((None, {0, 1, 2, 3}), (1, {3}), (2, {0, 3})):
        policy = MixtralOffloadPolicy(SMALL, "asynchronous", most)
        assert not policy.placement.awaited
        policy.set_gates(GateWeights(WEIGHT))
        assert set(asked(policy.on_gate(DECODE, here))) == {(1, index) for index in expected}


def test_deepspeed_fetches_and_awaits_every_expert_of_the_next_layer() -> None:
    policy = DeepSpeedPolicy(SMALL)
    assert policy.placement.awaited
    first = policy.on_embeddings(DECODE, np.zeros((1, 2), np.float32))
    assert list(asked(first)) == [(0, j) for j in range(4)]
    assert list(asked(policy.on_gate(DECODE, gate(0, (0.25,) * 4)))) == [(1, j) for j in range(4)]
    assert policy.on_gate(DECODE, gate(2, (0.25,) * 4)) is None
