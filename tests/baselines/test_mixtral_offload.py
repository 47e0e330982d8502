"""Mixtral-Offloading: the next gate's guess, and layers with equal shares of the cache."""

from __future__ import annotations

import numpy as np

from baselines.mixtral_offload import MixtralOffloadPolicy
from finemoe.offload.cache import NO_SLOT, NOBODY, ExpertCache
from finemoe.offload.policy import (
    ExpertId,
    Gate,
    GateWeights,
    Iteration,
    LayerOutcome,
    ModelShape,
)

SHAPE = ModelShape(layers=3, experts=4, top_k=2, hidden_size=2)
DECODE = Iteration(1, "decode", (0,), (1,))


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


def evicted(policy: MixtralOffloadPolicy, cache: ExpertCache, layer: int, index: int) -> int:
    """Load an expert on demand; return the place of who left for it."""
    expert = ExpertId(layer, index)
    policy.on_outcome(LayerOutcome(DECODE, layer, (), (), (index,)))
    left = cache.reserve(SHAPE.place(expert), True)
    assert left != NO_SLOT
    cache.loaded(SHAPE.place(expert))
    policy.on_load(expert)
    return left


def test_layers_get_equal_shares_and_the_oldest_of_the_fullest_leaves() -> None:
    policy = MixtralOffloadPolicy(SHAPE)
    cache = ExpertCache(SHAPE, (4,), policy.eviction_keys, policy.on_evict)
    for index in (0, 1, 2):
        assert evicted(policy, cache, 0, index) == NOBODY
    assert evicted(policy, cache, 1, 0) == NOBODY
    used(policy, 0, 0)
    # Layer 0 holds three: its oldest leaves, although layer 1 was used before.
    assert evicted(policy, cache, 1, 1) == SHAPE.place(ExpertId(0, 1))
    # Two each: the incoming expert's own layer gives way.
    assert evicted(policy, cache, 1, 2) == SHAPE.place(ExpertId(1, 0))
    assert evicted(policy, cache, 0, 3) == SHAPE.place(ExpertId(0, 2))
    # Layer 2 has none: the longest unused of the two fullest layers leaves.
    assert evicted(policy, cache, 2, 0) == SHAPE.place(ExpertId(0, 0))
    cache.check_integrity()


def test_a_prefetched_expert_stays_until_its_layers_gate() -> None:
    policy = MixtralOffloadPolicy(SHAPE)
    policy.on_load(ExpertId(1, 0))
    assert policy.eviction_keys(ExpertId(1, 1))[1, 0] == -np.inf
    used(policy, 1, 2)
    assert policy.eviction_keys(ExpertId(1, 1))[1, 0] > -np.inf
