"""Mixtral-Offloading: the next gate's guess, and layers with equal shares of the cache."""

from __future__ import annotations

import numpy as np
import pytest

from baselines.mixtral_offload import MixtralOffloadPolicy, likeliest
from finemoe.offload.cache import ExpertCache
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    GateWeights,
    Iteration,
    LayerOutcome,
    ModelShape,
)

SHAPE = ModelShape(layers=3, experts=4, top_k=2, hidden_size=2)
DECODE = Iteration(1, "decode", (0,), (1,))
PREFILL = Iteration(0, "prefill", (0,), (2,))

LOGITS: FloatArray = np.log(np.array([[0.5, 0.1, 0.1, 0.3], [0.2, 0.1, 0.6, 0.1]], np.float32))


def test_a_tokens_best_experts_come_in_order_of_probability() -> None:
    wishes = likeliest(LOGITS[:1], 2, layer=1)
    assert [wish.expert for wish in wishes] == [ExpertId(1, 0), ExpertId(1, 3)]
    assert [wish.priority for wish in wishes] == pytest.approx([0.5, 0.3])


def test_tokens_ask_together_with_their_largest_probability() -> None:
    wishes = likeliest(LOGITS, 2, layer=1)
    assert [wish.expert.index for wish in wishes] == [2, 0, 3]
    assert [wish.priority for wish in wishes] == pytest.approx([0.6, 0.5, 0.3])


def test_the_next_layers_gate_is_applied_to_this_layers_input() -> None:
    weight = np.zeros((3, 4, 2), np.float32)
    weight[1] = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    policy = MixtralOffloadPolicy(SHAPE)
    policy.set_gates(GateWeights(weight))
    inputs = np.array([[2, 1]], np.float32)
    gate = Gate(0, np.full((1, 4), 0.25, np.float32), (2, 3), inputs)
    # Logits 2, 1, -2, -1 at layer 1.
    assert [wish.expert for wish in policy.on_gate(DECODE, gate)] == [(1, 0), (1, 1)]
    biased = GateWeights(weight, np.array([[0] * 4, [0, 0, 9, 0], [0] * 4], np.float32))
    policy.set_gates(biased)
    assert [wish.expert for wish in policy.on_gate(DECODE, gate)] == [(1, 2), (1, 0)]
    last = Gate(2, gate.probabilities, (0, 1), inputs)
    assert list(policy.on_gate(DECODE, last)) == []


def used(policy: MixtralOffloadPolicy, layer: int, *experts: int) -> None:
    policy.on_outcome(LayerOutcome(DECODE, layer, experts, (), ()))


def evicted(policy: MixtralOffloadPolicy, cache: ExpertCache, layer: int, index: int) -> object:
    expert = ExpertId(layer, index)
    policy.on_outcome(LayerOutcome(DECODE, layer, (), (), (index,)))
    reservation = cache.reserve(expert, urgent=True)
    assert reservation is not None
    cache.loaded(expert)
    policy.on_load(expert)
    return reservation.evicted


def test_layers_get_equal_shares_and_the_oldest_of_the_fullest_leaves() -> None:
    policy = MixtralOffloadPolicy(SHAPE)
    cache = ExpertCache(SHAPE, (4,), policy.eviction_keys, policy.on_evict)
    for index in (0, 1, 2):
        assert evicted(policy, cache, 0, index) is None
    assert evicted(policy, cache, 1, 0) is None
    used(policy, 0, 0)
    # Layer 0 holds three: its oldest leaves, although layer 1 was used before.
    assert evicted(policy, cache, 1, 1) == (0, 1)
    # Two each: the incoming expert's own layer gives way.
    assert evicted(policy, cache, 1, 2) == (1, 0)
    assert evicted(policy, cache, 0, 3) == (0, 2)
    # Layer 2 has none: the longest unused of the two fullest layers leaves.
    assert evicted(policy, cache, 2, 0) == (0, 0)
    cache.check_integrity()


def test_serving_begins_with_an_empty_cache() -> None:
    policy = MixtralOffloadPolicy(SHAPE)
    policy.on_load(ExpertId(0, 0))
    used(policy, 0, 0)
    policy.begin_serving()
    assert (policy.eviction_keys(ExpertId(1, 0)) == [[0] * 4, [1] * 4, [0] * 4]).all()


def test_a_prefetched_expert_stays_until_its_layers_gate() -> None:
    policy = MixtralOffloadPolicy(SHAPE)
    policy.on_load(ExpertId(1, 0))
    assert policy.eviction_keys(ExpertId(1, 1))[1, 0] == -np.inf
    used(policy, 1, 2)
    assert policy.eviction_keys(ExpertId(1, 1))[1, 0] > -np.inf
