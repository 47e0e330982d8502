"""What Mixtral-Offloading and ProMoE share: probabilities, caches of equal shares, guesses."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baselines.mixtral_offload import MixtralOffloadPolicy
from baselines.speculation import likeliest
from finemoe.offload.eviction import LayeredLruPolicy
from finemoe.offload.policy import (
    SMALLEST_PRIORITY,
    ExpertId,
    GateWeights,
    LayerOutcome,
    ModelShape,
)
from tests.finemoe.offload.states import DECODE, asked, gate

SMALL = ModelShape(layers=3, experts=4, top_k=2, hidden_size=2)
WEIGHT = np.zeros((3, 4, 2), np.float32)
WEIGHT[1] = [[1, 0], [0, 1], [-1, 0], [0, -1]]


def test_layers_are_ranked_one_by_one_and_equal_scores_by_index() -> None:
    scores = np.zeros((2, 2, 4), np.float32)
    scores[1, :, 3] = 200
    # The second layer's other experts have probability 0, and one of them is chosen all the same.
    assert likeliest(scores, 2).tolist() == [[0.25, 0.25, 0, 0], [SMALLEST_PRIORITY, 0, 0, 1]]


def test_the_next_layers_gate_is_applied_to_this_layers_input() -> None:
    policy = MixtralOffloadPolicy(SMALL)
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


events = st.lists(
    st.tuples(st.sampled_from(["use", "come"]), st.integers(0, 2), st.integers(0, 3)), max_size=60
)


@given(events)
def test_the_order_is_that_of_shares_then_last_uses(happened: list[tuple[str, int, int]]) -> None:
    policy = LayeredLruPolicy(SMALL)
    last_used = np.zeros((3, 4))
    residents: set[ExpertId] = set()

    def evict(incoming: ExpertId) -> None:
        rank = 2 * np.bincount([expert.layer for expert in residents], minlength=3)
        rank[incoming.layer] += 1
        keys = rank[:, None] - last_used / 1000
        found = policy.eviction_keys(incoming, True)
        order = sorted(residents, key=lambda expert: (-keys[expert], expert))
        assert sorted(residents, key=lambda expert: (-found[expert], expert)) == order
        residents.remove(order[0])
        policy.on_evict(order[0])

    for time, (event, layer, index) in enumerate(happened, 1):
        expert = ExpertId(layer, index)
        if event == "come":
            if expert in residents:
                continue
            if len(residents) == 5:
                evict(expert)
            policy.on_load(expert)
            residents.add(expert)
        else:
            policy.on_outcome(LayerOutcome(DECODE, layer, (index,), (), ()))
        last_used[expert] = time
