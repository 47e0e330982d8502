"""Least-Stale: victims against a naive model, and its speculation."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.least_stale import LeastStalePolicy
from finemoe.offload.policy import ExpertId, GateWeights, LayerOutcome, ModelShape
from tests.finemoe.offload.states import DECODE, asked, decode, gate

SHAPE = ModelShape(layers=4, experts=3, top_k=1, hidden_size=2)
Order = Literal["fifo", "next_visit"]


def use(policy: LeastStalePolicy, number: int, layer: int, *indices: int) -> None:
    policy.on_outcome(LayerOutcome(decode(number, 0), layer, indices, (), ()))


def test_the_next_gate_speculates_in_the_background() -> None:
    weight = np.zeros((4, 3, 2), np.float32)
    weight[1] = [[1, 0], [0, 1], [-1, -1]]
    policy = LeastStalePolicy(SHAPE)
    policy.set_gates(GateWeights(weight))
    assert policy.placement.prediction == "background"
    assert not policy.placement.awaited
    spoken = gate(0, (1 / 3,) * 3, hidden=[[0, 2]])
    assert set(asked(policy.on_gate(DECODE, spoken))) == {(1, 1)}
    assert policy.on_gate(DECODE, spoken._replace(layer=3)) is None


events = st.lists(
    st.tuples(
        st.sampled_from(["pass", "use", "use", "come"]), st.integers(0, 3), st.integers(0, 2)
    ),
    min_size=20,
    max_size=80,
)


@pytest.mark.parametrize("kind", ["fifo", "next_visit"])
@given(happened=events)
def test_victims_are_a_naive_models(kind: Order, happened: list[tuple[str, int, int]]) -> None:
    policy = LeastStalePolicy(SHAPE, kind)
    queue: list[tuple[ExpertId, int]] = []  # residents and their passes, as they entered
    number, now = 0, -1

    def enter(expert: ExpertId) -> None:
        if (expert, number) not in queue:
            queue[:] = [one for one in queue if one[0] != expert]
            queue.append((expert, number))

    def victim() -> ExpertId:
        def visit(expert: ExpertId) -> int:
            coming = [step for step in range(now + 1, now + 5) if step % 4 == expert.layer]
            return coming[0]

        stale = [one for one, since in queue if since < number or one.layer <= now]
        if not stale:
            return queue[0][0]
        return stale[0] if kind == "fifo" else max(stale, key=visit)

    for event, layer, index in happened:
        expert = ExpertId(layer, index)
        if event == "pass":
            number, now = number + 1, layer
            use(policy, number, now)
            continue
        if number == 0:
            continue
        if expert not in [one for one, _ in queue]:
            if len(queue) == 3:
                gone = victim()
                keys = policy.eviction_keys(expert, True)
                assert gone == max((one for one, _ in queue), key=lambda one: keys[one])
                queue[:] = [one for one in queue if one[0] != gone]
                policy.on_evict(gone)
            policy.on_load(expert)
            enter(expert)
        if event == "use" and layer >= now:
            now = layer
            use(policy, number, now, index)
            enter(expert)
