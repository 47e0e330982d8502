"""Least-Stale: tiers and orders by hand, victims against a naive model, and its speculation."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.least_stale import LeastStalePolicy
from finemoe.offload.policy import ExpertId, Gate, GateWeights, Iteration, LayerOutcome, ModelShape
from tests.finemoe.offload.states import asked

SHAPE = ModelShape(layers=4, experts=3, top_k=1, hidden_size=2)
Order = Literal["fifo", "next_visit"]
NOBODY = ExpertId(3, 2)


def use(policy: LeastStalePolicy, number: int, layer: int, *indices: int) -> None:
    iteration = Iteration(number, "decode", (0,), (1,))
    policy.on_outcome(LayerOutcome(iteration, layer, indices, (), ()))


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [("fifo", "cdabe", "cdabe"), ("next_visit", "adcbe", "beadc")],
)
def test_stale_experts_leave_before_those_that_are_still_to_come(
    kind: Order, first: str, then: str
) -> None:
    named = {"a": ExpertId(0, 0), "b": ExpertId(1, 0), "c": ExpertId(2, 0), "d": ExpertId(3, 0)}
    named["e"] = ExpertId(1, 1)
    policy = LeastStalePolicy(SHAPE, kind)

    def order(residents: str) -> str:
        keys = policy.eviction_keys(NOBODY, True)
        return "".join(sorted(residents, key=lambda one: -keys[named[one]]))

    def load(expert: ExpertId) -> None:
        policy.on_evict(expert)
        policy.on_load(expert)

    for one in "abcd":
        use(policy, 0, *named[one])
        policy.on_load(named[one])
    use(policy, 1, *named["a"])  # a enters anew, and b and e are prefetched
    load(named["b"])
    load(named["e"])
    # Stale: a, whose layer has run, c and d of the pass before. Next visits: a's comes last.
    assert order("abcde") == first
    use(policy, 1, *named["b"])
    # Now b's layer has run as well, and so has e's.
    assert order("abcde") == then
    load(named["a"])
    assert order("abe") == "bea"


def test_the_next_gate_speculates_in_the_background() -> None:
    weight = np.zeros((4, 3, 2), np.float32)
    weight[1] = [[1, 0], [0, 1], [-1, -1]]
    policy = LeastStalePolicy(SHAPE)
    policy.set_gates(GateWeights(weight))
    assert policy.placement.prediction == "background"
    assert not policy.placement.awaited
    inputs = np.array([[0, 2]], np.float32)
    gate = Gate(0, np.full((1, 3), 1 / 3, np.float32), (0,), inputs)
    iteration = Iteration(0, "decode", (0,), (1,))
    assert set(asked(policy.on_gate(iteration, gate))) == {(1, 1)}
    assert policy.on_gate(iteration, gate._replace(layer=3)) is None


events = st.lists(
    st.tuples(
        st.sampled_from(["pass", "use", "use", "come"]), st.integers(0, 3), st.integers(0, 2)
    ),
    max_size=80,
)


@pytest.mark.parametrize("kind", ["fifo", "next_visit"])
@given(happened=events)
def test_victims_are_those_of_a_naive_model(
    kind: Order, happened: list[tuple[str, int, int]]
) -> None:
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
            if len(queue) == 5:
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
