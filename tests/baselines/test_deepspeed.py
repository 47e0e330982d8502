"""DeepSpeed: whole layers, one ahead; a layer under way does not push itself out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baselines.deepspeed import DeepSpeedPolicy
from finemoe.offload.cache import NO_SLOT, NOBODY, ExpertCache
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

    def bring(layer: int, index: int, urgent: bool = False) -> int:
        expert = ExpertId(layer, index)
        evicted = cache.reserve(SHAPE.place(expert), urgent)
        if evicted != NO_SLOT:
            cache.loaded(SHAPE.place(expert))
            policy.on_load(expert)
        return evicted

    assert [bring(0, 0), bring(0, 1), bring(1, 0)] == [NOBODY] * 3
    policy.on_outcome(LayerOutcome(DECODE, 0, (0,), (), ()))
    assert bring(1, 1) == SHAPE.place(ExpertId(0, 1))
    # Layer 1's own residents are older than layer 0's, and stay.
    assert bring(1, 2) == SHAPE.place(ExpertId(0, 0))
    # A layer larger than the slots: the rest is only loaded on demand.
    cache.pin(SHAPE.place(ExpertId(1, 0)))
    assert bring(2, 0) == SHAPE.place(ExpertId(1, 1))
    assert bring(2, 1) == SHAPE.place(ExpertId(1, 2))
    assert bring(2, 2) == NO_SLOT
    assert bring(2, 2, urgent=True) == SHAPE.place(ExpertId(2, 0))


events = st.lists(
    st.tuples(st.sampled_from(["use", "load", "ask"]), st.integers(0, 2), st.integers(0, 2)),
    max_size=40,
)


@given(events)
def test_the_order_is_that_of_last_uses_but_for_the_incoming_layer(
    happened: list[tuple[str, int, int]],
) -> None:
    policy, last_used = DeepSpeedPolicy(SHAPE), np.zeros((3, 3))
    for time, (event, layer, index) in enumerate(happened, 1):
        if event == "use":
            policy.on_outcome(LayerOutcome(DECODE, layer, (index,), (), ()))
        elif event == "load":
            policy.on_load(ExpertId(layer, index))
        if event != "ask":
            last_used[layer, index] = time
            continue
        keys = policy.eviction_keys(ExpertId(layer, index))
        assert (keys[layer] == -np.inf).all()
        others = np.arange(3) != layer
        expected = (-last_used[others]).ravel().argsort(kind="stable")
        assert (keys[others].ravel().argsort(kind="stable") == expected).all()
