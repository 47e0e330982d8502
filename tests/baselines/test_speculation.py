"""What Mixtral-Offloading and ProMoE share: rankings, caches of equal shares, guesses ahead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.mixtral_offload import MixtralOffloadPolicy
from baselines.promoe import LearnedPredictor, ProMoEOptions, ProMoEPolicy
from baselines.speculation import SpeculatingPolicy, likeliest
from finemoe.offload.eviction import LayeredLruPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    GateWeights,
    Iteration,
    LayerOutcome,
    ModelShape,
)

SHAPE = ModelShape(layers=6, experts=60, top_k=4, hidden_size=64)
SMALL = ModelShape(layers=3, experts=4, top_k=2, hidden_size=1)
DECODE = Iteration(0, "decode", (0,), (1,))
LOGITS: FloatArray = np.log(np.array([[0.5, 0.1, 0.1, 0.3], [0.2, 0.1, 0.6, 0.1]], np.float32))


def test_a_tokens_best_experts_come_in_order_of_probability() -> None:
    (ranking,) = likeliest(LOGITS[None, :1], 2)
    assert [index for index, _ in ranking] == [0, 3]
    assert [probability for _, probability in ranking] == pytest.approx([0.5, 0.3])


def test_tokens_ask_together_with_their_largest_probability() -> None:
    (ranking,) = likeliest(LOGITS[None], 2)
    assert [index for index, _ in ranking] == [2, 0, 3]
    assert [probability for _, probability in ranking] == pytest.approx([0.6, 0.5, 0.3])


def test_layers_are_ranked_one_by_one_and_equal_scores_by_index() -> None:
    scores = np.zeros((2, 2, 4), np.float32)
    scores[1, :, 3] = 200
    # The second layer's other experts have probability 0, and one of them is chosen all the same.
    assert likeliest(scores, 2) == [[(0, 0.25), (1, 0.25)], [(3, 1.0), (0, 0.0)]]


def mixtral_offload(draw: np.random.Generator) -> SpeculatingPolicy:
    return MixtralOffloadPolicy(SHAPE)


def by_gates(draw: np.random.Generator) -> SpeculatingPolicy:
    return ProMoEPolicy(SHAPE, ProMoEOptions(2, extra=1))


def learned(draw: np.random.Generator) -> SpeculatingPolicy:
    policy = ProMoEPolicy(SHAPE, ProMoEOptions(2))
    shapes = [(4, 32, 64), (4, 32), (4, 60, 32), (4, 60)]
    weights = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    policy._learned = LearnedPredictor(*weights)
    return policy


@pytest.mark.parametrize("make", [mixtral_offload, by_gates, learned])
@pytest.mark.parametrize("biased", [True, False])
@settings(max_examples=20, deadline=None)
@given(tokens=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_what_is_computed_ahead_changes_no_answer(
    make: Callable[[np.random.Generator], SpeculatingPolicy],
    biased: bool,
    tokens: list[int],
    seed: int,
) -> None:
    plain, ahead = make(np.random.default_rng(seed)), make(np.random.default_rng(seed))
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(6, 60, 64)).astype(np.float32)
    bias = draw.normal(size=(6, 60)).astype(np.float32) if biased else None
    for policy in (plain, ahead):
        policy.set_gates(GateWeights(weight, bias))
    for number in range(2):
        iteration = Iteration(number, "prefill", tuple(range(len(tokens))), tuple(tokens))
        hidden = draw.normal(size=(6, sum(tokens), 64)).astype(np.float32)
        probabilities = np.full((6, sum(tokens), 60), 1 / 60, np.float32)
        for policy in (plain, ahead):
            policy.on_embeddings(iteration, hidden[0])
        ahead.compute_ahead(iteration, Gates(probabilities, [(0,)] * 6, hidden))
        asked = 0
        for layer in range(6):
            spoken = Gate(layer, probabilities[layer], (0,), hidden[layer])
            wishes = plain.on_gate(iteration, spoken)
            assert wishes == ahead.on_gate(iteration, spoken)
            asked += len(wishes)
        assert asked >= 4 * SHAPE.top_k


def test_an_iteration_that_nothing_was_computed_for_is_answered_by_itself() -> None:
    policy = MixtralOffloadPolicy(SHAPE)
    draw = np.random.default_rng(0)
    policy.set_gates(GateWeights(draw.normal(size=(6, 60, 64)).astype(np.float32)))
    first, second = draw.normal(size=(2, 6, 1, 64)).astype(np.float32)
    probabilities = np.full((6, 1, 60), 1 / 60, np.float32)
    policy.compute_ahead(DECODE, Gates(probabilities, [(0,)] * 6, first))
    spoken = Gate(0, probabilities[0], (0,), second[0])
    before = policy.on_gate(DECODE, spoken)
    policy.on_embeddings(DECODE, second[0])
    assert policy.on_gate(DECODE, spoken) != before


events = st.lists(
    st.tuples(st.sampled_from(["use", "demand", "come"]), st.integers(0, 2), st.integers(0, 3)),
    max_size=60,
)


@given(events)
def test_the_incremental_order_is_that_of_shares_then_last_uses(
    happened: list[tuple[str, int, int]],
) -> None:
    policy = LayeredLruPolicy(SMALL)
    last_used, kept, demanded = np.zeros((3, 4)), np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    residents: set[ExpertId] = set()

    def evict(incoming: ExpertId) -> None:
        rank = 2 * np.bincount([expert.layer for expert in residents], minlength=3)
        rank[incoming.layer] += 1
        keys = rank[:, None] - last_used / 1000
        keys[kept] = -np.inf
        found = policy.eviction_keys(incoming)
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
            last_used[expert], kept[expert] = time, not demanded[expert]
            demanded[expert] = False
            continue
        kinds = ((index,), (), ()) if event == "use" else ((), (), (index,))
        policy.on_outcome(LayerOutcome(DECODE, layer, *kinds))
        last_used[expert] = time
        kept[layer] = demanded[layer] = False
        demanded[expert] = event == "demand"
