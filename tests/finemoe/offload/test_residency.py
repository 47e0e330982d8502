"""How gates and requests become cache and queue operations, and how accesses are classified."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.offload.policy import (
    ExpertId,
    LayerOutcome,
    ModelShape,
    Need,
    Placement,
    Policy,
    PolicyError,
    Priorities,
)
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.transfer import Traffic
from tests.finemoe.offload.states import State, asking, decode, state

SHAPE = ModelShape(layers=3, experts=4, top_k=2, hidden_size=1)
EXPERT_BYTES, CHUNK_BYTES = 10, 5


class LowestFirst(Policy):
    """Evicts the lowest expert first, unless its keys are changed."""

    keys = -np.arange(12.0).reshape(3, 4)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Any:
        return self.keys


def residency(*slots: int, protect: bool = False, policy: Policy | None = None) -> Residency:
    """Return one whose first iteration has begun."""
    plan = MemoryPlan(slots, EXPERT_BYTES, CHUNK_BYTES, protect)
    made = Residency(SHAPE, plan, policy or LowestFirst())
    made.begin_iteration(decode(0, 0))
    return made


@pytest.mark.parametrize("replaces", [False, True])
def test_an_answer_takes_back_earlier_requests_if_the_placement_says_so(replaces: bool) -> None:
    engine = residency(4)
    engine.policy.placement = Placement("background", replaces=replaces)
    ask(engine, 0, (1, 0), (1, 1))
    copy(engine, 1)
    ask(engine, 0, (2, 0))
    # What is under way goes on.
    assert requested(engine) == ([(1, 0), (2, 0)] if replaces else [(1, 0), (1, 1), (2, 0)])


@pytest.mark.parametrize("wraps", [False, True])
def test_requests_for_layers_that_ran_may_be_for_the_next_iteration(wraps: bool) -> None:
    engine = residency(6)
    engine.policy.placement = Placement("background", wraps=wraps)

    def answer(number: int, layer: int, *experts: tuple[int, int]) -> list[ExpertId]:
        engine.prefetch(number, ranked(*experts), engine.policy.on_gate, layer)
        return requested(engine)

    for layer in (0, 1):
        engine.gate(decode(0, 0), layer, ())
    # Layer 1 ran before the answer to the gate of layer 0 came.
    found = answer(0, 0, (0, 1), (1, 1), (2, 1))
    assert found == ([(0, 1), (2, 1)] if wraps else [(2, 1)])
    engine.gate(decode(0, 0), 2, ())
    engine.begin_iteration(decode(1, 0))
    assert requested(engine) == ([(0, 1)] if wraps else [])
    engine.gate(decode(1, 0), 0, ())
    # An answer that comes an iteration late: only layer 1 is still to come of what it was for.
    assert answer(0, 1, (0, 2), (1, 2), (2, 2)) == ([(1, 2)] if wraps else [])
    engine.gate(decode(1, 0), 1, ())
    assert answer(0, 0, (0, 3), (1, 3), (2, 3)) == []
    engine.begin_iteration(decode(2, 0))
    assert answer(0, 1, (0, 2), (1, 2), (2, 2)) == []


def ranked(*experts: tuple[int, int]) -> Priorities:
    """Ask for experts, the first one most."""
    return asking(SHAPE, {expert: 1 / (rank + 1) for rank, expert in enumerate(experts)})


def ask(engine: Residency, number: int, *experts: tuple[int, int]) -> bool:
    """Have the policy request experts; return whether a link is to look at that."""
    woken: list[None] = []
    engine.wake = lambda: woken.append(None)
    engine.prefetch(number, ranked(*experts), engine.policy.on_gate)
    return bool(woken)


def copy(engine: Residency, chunks: int, device: int = 0) -> None:
    for _ in range(chunks):
        chunk = engine.next_chunk(device)
        assert chunk is not None
        engine.chunk_done(device, chunk)


def copy_all(engine: Residency) -> list[ExpertId]:
    """Copy until nothing is left and return what became resident, in order."""
    loaded = []
    for device in range(len(engine.queues)):
        while (chunk := engine.next_chunk(device)) is not None:
            if engine.chunk_done(device, chunk):
                loaded.append(engine.experts[chunk.flat])
    engine.cache.check_integrity()
    return loaded


def kinds(outcome: LayerOutcome) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return outcome.hits, outcome.late, outcome.misses


def requested(engine: Residency) -> list[ExpertId]:
    queues, device = engine.queues, engine.cache.device_of
    return [e for n, e in enumerate(engine.experts) if queues[device(n)].requested(n)]


def at(layer: int, index: int) -> int:
    return layer * SHAPE.experts + index


def test_an_access_is_a_hit_late_or_a_miss() -> None:
    engine, now = residency(4), decode(0, 0)
    ask(engine, 0, (0, 2), (0, 0), (0, 3))
    copy(engine, 3)  # expert 2 arrives, expert 0 is half copied, expert 3 queued
    outcome = engine.gate(now, 0, (0, 1, 2, 3))
    assert kinds(outcome) == ((2,), (0, 3), (1,))
    assert outcome.activated == (0, 1, 2, 3)
    assert (outcome.iteration, outcome.layer) == (now, 0)
    # Expert 0 goes on where it stood.
    copy_all(engine)
    assert engine.traffic() == Traffic(prefetched=15, on_demand=25, wasted=0)


def test_a_gate_cancels_the_prefetches_of_its_layer_that_it_did_not_choose() -> None:
    engine = residency(4)
    ask(engine, 0, (0, 0), (0, 1), (1, 0), (0, 2))
    copy(engine, 1)
    engine.gate(decode(0, 0), 0, (1,))
    assert requested(engine) == [ExpertId(0, 1), ExpertId(1, 0)]
    assert state(engine.cache, at(0, 0)) is State.ABSENT
    assert engine.traffic().wasted == 5


class Hosting(LowestFirst):
    """Has the host compute what the test says; keeps what it was asked."""

    def __init__(self, answer: object) -> None:
        self.answer, self.asked = answer, list[Need]()

    def host_experts(self, need: Need) -> Any:
        self.asked.append(need)
        return self.answer


def test_what_the_host_computes_takes_no_slot_and_no_link() -> None:
    policy, now = Hosting({3, 0}), decode(0, 0)
    engine = residency(4, policy=policy)
    ask(engine, 0, (0, 2), (0, 0))
    copy(engine, 3)  # expert 2 arrives, expert 0 is half copied
    outcome = engine.gate(now, 0, (0, 1, 2, 3), [1, 5, 2, 4])
    assert policy.asked == [Need(now, 0, [1, 5, 2, 4], (2,), (0, 1, 3))]
    assert outcome.activated == (0, 1, 2, 3)
    assert outcome == (now, 0, (2,), (), (1,), (0, 3))
    assert not engine.cache.is_pinned(at(0, 0))
    # What was copied of expert 0 is given up.
    assert copy_all(engine) == [(0, 1)]
    assert engine.traffic() == Traffic(prefetched=15, on_demand=10, wasted=5)
    # It is asked only where something is missing.
    for index in (1, 2):
        engine.release(at(0, index))
    engine.gate(decode(1, 0), 0, (1, 2), [0, 1, 1])
    assert len(policy.asked) == 1


def test_who_may_have_the_host_compute_is_told_what_links_copy() -> None:
    policy = Hosting([])
    engine = residency(4, policy=policy)
    ask(engine, 0, (0, 2), (0, 0))
    engine.next_chunk(0)
    engine.gate(decode(0, 0), 0, (0, 1, 2), [1, 1, 1])
    assert (policy.asked[0].missing, policy.asked[0].arriving) == ((0, 1, 2), (2,))


@pytest.mark.parametrize("answer", [None, 3, [2], [0, 7]])
def test_the_host_computes_only_what_is_missing(answer: object) -> None:
    engine = residency(4, policy=Hosting(answer))
    engine.preload()
    with pytest.raises(PolicyError, match=r"^Hosting.host_experts, layer 1: answered "):
        engine.gate(decode(0, 0), 1, (0, 1), [1, 1])


def test_requests_for_the_next_iteration_are_kept_until_it_runs() -> None:
    engine = residency(4)
    for layer in range(3):
        engine.gate(decode(0, 0), layer, ())
    assert ask(engine, 1, (0, 0), (1, 1))
    engine.begin_iteration(decode(1, 0))
    assert ask(engine, 1, (0, 2))
    assert requested(engine) == [ExpertId(0, 0), ExpertId(0, 2), ExpertId(1, 1)]
    assert kinds(engine.gate(decode(1, 0), 0, (0,))) == ((), (0,), ())
    assert requested(engine) == [ExpertId(0, 0), ExpertId(1, 1)]


def test_a_hit_saves_its_prefetch_from_counting_as_waste() -> None:
    engine = residency(2)
    ask(engine, 0, (0, 0), (0, 1))
    copy_all(engine)
    assert kinds(engine.gate(decode(0, 0), 0, (0,))) == ((0,), (), ())
    engine.release(at(0, 0))
    engine.gate(decode(0, 0), 1, (0, 1))
    copy_all(engine)
    # Experts (0, 0) and (0, 1) were evicted; only the second was never used.
    assert engine.traffic() == Traffic(prefetched=20, on_demand=20, wasted=10)


@pytest.mark.parametrize("protect", [False, True])
def test_protected_experts_leave_for_no_prefetch_and_last_on_demand(protect: bool) -> None:
    """The policy's keys alone evict the lowest expert first."""
    engine = residency(2, protect=protect)
    ask(engine, 0, (1, 0))
    copy_all(engine)
    ask(engine, 0, (1, 0), (1, 1), (2, 2))
    # Expert (1, 0) is asked for although it is there; the second slot goes to (1, 1).
    assert copy_all(engine) == ([(1, 1)] if protect else [(1, 1), (2, 2)])
    if not protect:
        return
    # On demand (1, 0) goes, as nobody else can; what is left waits for the gate of layer 1.
    engine.gate(decode(0, 0), 0, (3,))
    assert copy_all(engine) == [(0, 3)]
    assert state(engine.cache, at(1, 0)) is State.ABSENT
    engine.release(at(0, 3))
    # Now (0, 3) can go, of the higher key, and does so for the prefetch of (2, 2).
    assert copy_all(engine) == [(2, 2)]
    # The gate of layer 1 does not choose (1, 1), which then leaves before the protected (2, 2).
    engine.gate(decode(0, 0), 1, (3,))
    assert copy_all(engine) == [(1, 3)]
    assert state(engine.cache, at(2, 2)) is State.RESIDENT


def test_protection_lasts_from_the_request_to_the_gate() -> None:
    engine = residency(4, protect=True)
    ask(engine, 0, (1, 0))
    ask(engine, 0, (2, 0))
    assert engine.cache.protected.nonzero()[0].tolist() == [at(1, 0), at(2, 0)]
    for layer in range(2):
        engine.gate(decode(0, 0), layer, ())
    ask(engine, 0, (0, 1), (2, 1))
    assert engine.cache.protected.nonzero()[0].tolist() == [at(2, 0), at(2, 1)]


def test_of_what_is_requested_only_the_most_wanted_of_a_layer_are_awaited() -> None:
    policy = LowestFirst()
    policy.placement = Placement("critical_path", awaited=True, awaits=(2, 1))
    engine = residency(4, policy=policy)
    # Before layer 0, two layers ahead is layer 1: of (1, 2) and (1, 1) the first is awaited.
    engine.prefetch(0, ranked((0, 0), (1, 2), (1, 1)), policy.on_embeddings)
    copy(engine, 3)
    assert not engine.arrived()
    copy(engine, 1)
    assert engine.arrived()
    assert not engine.settled()
    # Until the next gate is answered there is nobody to wait for; then it is (2, 0).
    engine.prefetch(0, ranked((1, 3)), policy.on_embeddings)
    assert not engine.arrived()
    engine.gate(decode(0, 0), 0, ())
    assert engine.arrived()
    engine.prefetch(0, ranked((1, 0), (2, 0)), policy.on_gate, 0)
    assert not engine.arrived()
    # After layer 1 there is no layer so far ahead.
    engine.gate(decode(0, 0), 1, ())
    engine.prefetch(0, ranked((2, 1)), policy.on_gate, 1)
    assert engine.arrived()


def test_a_preload_fills_every_device_with_its_first_experts() -> None:
    engine = residency(1, 2)
    assert [engine.experts[flat] for flat in engine.preload()] == [(0, 0), (0, 1), (0, 3)]
    engine.cache.check_integrity()
    assert kinds(engine.gate(decode(0, 0), 0, (0, 1, 3))) == ((0, 1, 3), (), ())


@pytest.mark.parametrize("protect", [False, True])
@given(
    slots=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.sampled_from("tlgrc"), st.integers(0, 2), st.integers(0, 3))),
)
def test_no_link_oversleeps(protect: bool, slots: list[int], steps: list[Any]) -> None:
    engine = residency(*slots, protect=protect)
    asleep: set[int] = set()
    engine.wake = asleep.clear
    pinned: list[int] = []
    now, layer = 0, -1
    for what, device, index in steps:
        if what == "t":
            engine.prefetch(now, np.ones((3, 4)), engine.policy.on_gate)
        elif what == "l":
            engine.prefetch(now, ranked((device, index)), engine.policy.on_gate)
        elif what == "g" and not pinned:
            now, layer = (now + 1, 0) if layer == 2 else (now, layer + 1)
            engine.gate(decode(now, 0), layer, (index,))
            pinned.append(at(layer, index))
        elif what == "r" and pinned and engine.cache.is_resident(pinned[0]):
            engine.release(pinned.pop())
        elif what == "c" and device < len(slots) and device not in asleep:
            chunk = engine.next_chunk(device)
            if chunk is None:
                asleep.add(device)
            else:
                engine.chunk_done(device, chunk)
        assert all(engine.queues[device].settled() for device in asleep)


def test_what_is_nan_is_refused_and_a_key_where_it_decides() -> None:
    engine, keys = residency(1), np.zeros((3, 4))
    with pytest.raises(PolicyError, match=r"^LowestFirst.on_gate, layer 1: answered "):
        engine.prefetch(0, np.full((3, 4), np.nan), engine.policy.on_gate, 1)
    engine.policy.keys = keys  # type: ignore[attr-defined]
    engine.preload()
    keys[2, 3] = np.nan
    ask(engine, 0, (1, 2))
    assert copy_all(engine) == [(1, 2)]
    engine.policy.keys = np.full((3, 4), np.nan)  # type: ignore[attr-defined]
    ask(engine, 0, (1, 3))
    with pytest.raises(PolicyError, match=r"eviction_keys, layer 1: answered keys that hold NaN"):
        engine.next_chunk(0)
