"""DeepSpeed: whole layers, one ahead; a layer under way does not push itself out."""

from __future__ import annotations

import numpy as np

from baselines.deepspeed import DeepSpeedPolicy
from finemoe.offload.cache import ExpertCache
from finemoe.offload.policy import ExpertId, Gate, Iteration, LayerOutcome, ModelShape

SHAPE = ModelShape(layers=3, experts=3, top_k=1, hidden_size=2)
DECODE = Iteration(1, "decode", (0,), (1,))


def gate(layer: int) -> Gate:
    return Gate(layer, np.full((1, 3), 1 / 3, np.float32), (0,), None)


def test_every_expert_of_the_next_layer_is_fetched_and_awaited() -> None:
    policy = DeepSpeedPolicy(SHAPE)
    assert policy.placement.awaited
    first = policy.on_embeddings(DECODE, np.zeros((1, 2), np.float32))
    assert [wish.expert for wish in first] == [(0, 0), (0, 1), (0, 2)]
    second = policy.on_gate(DECODE, gate(0))
    assert [wish.expert for wish in second] == [(1, 0), (1, 1), (1, 2)]
    assert list(policy.on_gate(DECODE, gate(2))) == []


def test_least_recently_used_leaves_but_not_for_its_own_layer() -> None:
    policy = DeepSpeedPolicy(SHAPE)
    cache = ExpertCache(SHAPE, (3,), policy.eviction_keys, policy.on_evict)

    def bring(layer: int, index: int, urgent: bool = False) -> object:
        expert = ExpertId(layer, index)
        reservation = cache.reserve(expert, urgent)
        if reservation is None:
            return "no slot"
        cache.loaded(expert)
        policy.on_load(expert)
        return reservation.evicted

    assert [bring(0, 0), bring(0, 1), bring(1, 0)] == [None] * 3
    policy.on_outcome(LayerOutcome(DECODE, 0, (0,), (), ()))
    assert bring(1, 1) == (0, 1)
    # Layer 1's own residents are older than layer 0's, and stay.
    assert bring(1, 2) == (0, 0)
    # A layer larger than the slots: the rest is only loaded on demand.
    cache.pin(ExpertId(1, 0))
    assert bring(2, 0) == (1, 1)
    assert bring(2, 1) == (1, 2)
    assert bring(2, 2) == "no slot"
    assert bring(2, 2, urgent=True) == (2, 0)


def test_serving_begins_with_an_empty_cache() -> None:
    policy = DeepSpeedPolicy(SHAPE)
    policy.on_load(ExpertId(1, 1))
    policy.begin_serving()
    assert (policy.eviction_keys(ExpertId(0, 0))[1:] == 0).all()
