"""DeepSpeed: whole layers, one ahead, in the order of last uses."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baselines.deepspeed import DeepSpeedPolicy
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape
from tests.finemoe.offload.states import DECODE, asked, gate

SHAPE = ModelShape(layers=3, experts=3, top_k=1, hidden_size=2)


def test_every_expert_of_the_next_layer_is_fetched_and_awaited() -> None:
    policy = DeepSpeedPolicy(SHAPE)
    assert policy.placement.awaited
    first = policy.on_embeddings(DECODE, np.zeros((1, 2), np.float32))
    assert list(asked(first)) == [(0, 0), (0, 1), (0, 2)]
    second = policy.on_gate(DECODE, gate(0, (1 / 3,) * 3))
    assert list(asked(second)) == [(1, 0), (1, 1), (1, 2)]
    assert policy.on_gate(DECODE, gate(2, (1 / 3,) * 3)) is None


events = st.lists(
    st.tuples(st.sampled_from(["use", "load", "ask"]), st.integers(0, 2), st.integers(0, 2)),
    max_size=40,
)


@given(events)
def test_the_order_is_that_of_last_uses(happened: list[tuple[str, int, int]]) -> None:
    policy, last_used = DeepSpeedPolicy(SHAPE), np.zeros((3, 3))
    for time, (event, layer, index) in enumerate(happened, 1):
        if event == "use":
            policy.on_outcome(LayerOutcome(DECODE, layer, (index,), (), ()))
        elif event == "load":
            policy.on_load(ExpertId(layer, index))
        if event != "ask":
            last_used[layer, index] = time
            continue
        keys = policy.eviction_keys(ExpertId(layer, index), True)
        assert (keys[layer] == -np.inf).all()
        others = np.arange(3) != layer
        expected = (-last_used[others]).ravel().argsort(kind="stable")
        assert (keys[others].ravel().argsort(kind="stable") == expected).all()
