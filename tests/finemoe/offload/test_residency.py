"""How gates and wishes become cache and queue operations, and how accesses are classified."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from finemoe.offload.cache import State
from finemoe.offload.policy import (
    ExpertId,
    Iteration,
    LayerOutcome,
    ModelShape,
    Policy,
    Prefetch,
)
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.transfer import Traffic

SHAPE = ModelShape(layers=3, experts=4, top_k=2, hidden_size=1)
EXPERT_BYTES, CHUNK_BYTES = 10, 5


class ListeningPolicy(Policy):
    """Evicts the lowest expert first and remembers what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[LayerOutcome] = []
        self.loads: list[ExpertId] = []

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self.outcomes.append(outcome)

    def on_load(self, expert: ExpertId) -> None:
        self.loads.append(expert)

    def eviction_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        return -np.arange(12.0).reshape(3, 4)


def residency(*slots: int) -> Residency:
    return Residency(SHAPE, MemoryPlan(slots, EXPERT_BYTES, CHUNK_BYTES), ListeningPolicy())


def listener(engine: Residency) -> ListeningPolicy:
    assert isinstance(engine.policy, ListeningPolicy)
    return engine.policy


def iteration(number: int) -> Iteration:
    return Iteration(number, "decode", (0,), (1,))


def wish(*experts: tuple[int, int]) -> list[Prefetch]:
    """Ask for experts, the first one most."""
    return [Prefetch(ExpertId(*expert), 1 / (rank + 1)) for rank, expert in enumerate(experts)]


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
                loaded.append(engine.experts[chunk.place])
    engine.cache.check_integrity()
    return loaded


def kinds(outcome: LayerOutcome) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return outcome.hits, outcome.late, outcome.misses


def requested(engine: Residency) -> list[ExpertId]:
    places = range(SHAPE.size)
    wanted = [p for p in places if engine.queues[engine.cache.device_of(p)].requested(p)]
    return [engine.experts[place] for place in wanted]


def at(layer: int, index: int) -> int:
    return SHAPE.place(ExpertId(layer, index))


def release(engine: Residency, layer: int, indices: Iterable[int]) -> None:
    for index in indices:
        engine.release(at(layer, index))


def test_an_access_is_a_hit_late_or_a_miss() -> None:
    engine = residency(4)
    now = iteration(0)
    engine.begin_iteration(now)
    engine.prefetch(0, wish((0, 2), (0, 0), (0, 3)))
    copy(engine, 3)  # expert 2 arrives, expert 0 is half copied, expert 3 queued
    outcome = engine.gate(now, 0, (0, 1, 2, 3))
    assert kinds(outcome) == ((2,), (0, 3), (1,))
    assert outcome.activated == (0, 1, 2, 3)
    assert (outcome.iteration, outcome.layer) == (now, 0)


def test_what_was_loaded_on_demand_is_a_hit_afterwards() -> None:
    engine = residency(4)
    assert kinds(engine.gate(iteration(0), 0, (1, 3))) == ((), (), (1, 3))
    copy_all(engine)
    release(engine, 0, (1, 3))
    assert kinds(engine.gate(iteration(1), 0, (1, 3))) == ((1, 3), (), ())


def test_what_was_evicted_is_a_miss_again() -> None:
    engine = residency(1)
    for number, index in enumerate((0, 1, 0)):
        outcome = engine.gate(iteration(number), 0, (index,))
        assert kinds(outcome) == ((), (), (index,))
        copy_all(engine)
        release(engine, 0, (index,))


def test_a_cancelled_prefetch_in_flight_is_a_miss_and_goes_on_where_it_stood() -> None:
    engine = residency(2)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((0, 1)))
    chunk = engine.next_chunk(0)
    assert chunk is not None
    engine.gate(iteration(0), 0, (0,))
    outcome = engine.gate(iteration(1), 0, (1,))
    assert kinds(outcome) == ((), (), (1,))
    engine.chunk_done(0, chunk)
    copy_all(engine)
    assert engine.traffic() == Traffic(prefetched=5, on_demand=15, wasted=0)


def test_late_and_missed_experts_are_demanded_before_other_prefetches() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((1, 0), (0, 3)))
    engine.gate(iteration(0), 0, (1, 3))
    assert copy_all(engine) == [ExpertId(0, 3), ExpertId(0, 1), ExpertId(1, 0)]
    assert engine.traffic() == Traffic(prefetched=10, on_demand=20, wasted=0)


def test_a_gate_cancels_the_prefetches_of_its_layer_that_it_did_not_choose() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((0, 0), (0, 1), (1, 0), (0, 2)))
    copy(engine, 1)
    engine.gate(iteration(0), 0, (1,))
    assert requested(engine) == [ExpertId(0, 1), ExpertId(1, 0)]
    assert engine.cache.state(at(0, 0)) is State.ABSENT
    assert engine.traffic().wasted == 5


def test_a_gate_cancels_on_every_device() -> None:
    engine = residency(2, 2, 2)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((0, 0), (0, 1), (0, 2), (0, 3)))
    engine.gate(iteration(0), 0, (3,))
    assert requested(engine) == [ExpertId(0, 3)]


def test_wishes_for_layers_that_already_ran_are_dropped() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(0))
    engine.gate(iteration(0), 0, ())
    engine.gate(iteration(0), 1, ())
    assert engine.prefetch(0, wish((0, 0), (1, 1), (2, 2))) == 1
    assert requested(engine) == [ExpertId(2, 2)]


def test_before_the_first_gate_every_wish_is_in_time() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(5))
    assert engine.prefetch(5, wish((0, 0), (1, 1), (2, 2))) == 3


def test_wishes_of_an_earlier_iteration_are_dropped() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(0))
    engine.begin_iteration(iteration(1))
    assert engine.prefetch(0, wish((2, 0))) == 0
    assert requested(engine) == []


def test_wishes_for_the_next_iteration_are_kept_until_it_runs() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(0))
    for layer in range(3):
        engine.gate(iteration(0), layer, ())
    assert engine.prefetch(1, wish((0, 0), (1, 1))) == 2
    engine.begin_iteration(iteration(1))
    assert engine.prefetch(1, wish((0, 2))) == 1
    assert requested(engine) == [ExpertId(0, 0), ExpertId(0, 2), ExpertId(1, 1)]
    assert kinds(engine.gate(iteration(1), 0, (0,))) == ((), (0,), ())
    assert requested(engine) == [ExpertId(0, 0), ExpertId(1, 1)]


def test_wishes_before_any_iteration_are_in_time() -> None:
    assert residency(4).prefetch(0, wish((0, 0))) == 1


def test_everything_activated_is_pinned_until_its_release() -> None:
    engine = residency(2)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((0, 0), (0, 1)))
    copy(engine, 3)  # expert 0 is resident, expert 1 half copied, expert 2 neither
    engine.gate(iteration(0), 0, (0, 1, 2))
    activated = [at(0, index) for index in range(3)]
    assert all(engine.is_pinned(place) for place in activated)
    assert copy_all(engine) == [(0, 1)]
    engine.release(at(0, 0))
    assert [engine.is_pinned(place) for place in activated] == [False, True, True]
    assert copy_all(engine) == [(0, 2)]
    assert engine.cache.state(at(0, 0)) is State.ABSENT
    assert engine.cache.state(at(0, 1)) is State.RESIDENT


def test_a_layer_wider_than_the_budget_is_served_as_experts_are_released() -> None:
    engine = residency(1, 1)
    engine.gate(iteration(0), 2, (0, 1, 2, 3))
    assert copy_all(engine) == [ExpertId(2, 0), ExpertId(2, 1)]
    release(engine, 2, (1, 0))
    assert copy_all(engine) == [ExpertId(2, 2), ExpertId(2, 3)]
    assert engine.cache.peak_occupied == 2


def test_a_hit_saves_its_prefetch_from_counting_as_waste() -> None:
    engine = residency(2)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((0, 0), (0, 1)))
    copy_all(engine)
    assert kinds(engine.gate(iteration(0), 0, (0,))) == ((0,), (), ())
    release(engine, 0, (0,))
    engine.gate(iteration(0), 1, (0, 1))
    copy_all(engine)
    # Experts (0, 0) and (0, 1) were evicted; only the second was never used.
    assert engine.traffic() == Traffic(prefetched=20, on_demand=20, wasted=10)


def test_the_policy_is_told_of_every_outcome_and_load() -> None:
    engine = residency(4)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((1, 1)))
    outcomes = [engine.gate(iteration(0), 0, (2, 3))]
    copy_all(engine)
    outcomes.append(engine.gate(iteration(0), 1, (1,)))
    assert listener(engine).outcomes == outcomes
    assert listener(engine).loads == [ExpertId(0, 2), ExpertId(0, 3), ExpertId(1, 1)]


def test_traffic_is_the_sum_over_links() -> None:
    engine = residency(1, 1, 1)
    engine.begin_iteration(iteration(0))
    engine.prefetch(0, wish((1, 1), (1, 2)))  # devices 2 and 0
    engine.gate(iteration(0), 0, (1,))  # device 1
    copy_all(engine)
    assert engine.traffic() == Traffic(prefetched=20, on_demand=10, wasted=0)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ((3,), [(0, 0), (0, 1), (0, 2)]),
        ((1, 2), [(0, 0), (0, 1), (0, 3)]),
        ((6, 6), [(layer, index) for layer in range(3) for index in range(4)]),
    ],
)
def test_a_preload_fills_every_device_with_its_first_experts(
    slots: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    engine = residency(*slots)
    assert [engine.experts[place] for place in engine.preload()] == expected
    engine.cache.check_integrity()
    assert engine.cache.occupied == sum(slots)
    assert all(engine.cache.state(at(*expert)) is State.RESIDENT for expert in expected)
    assert kinds(engine.gate(iteration(0), 0, (0,))) == ((0,), (), ())


def test_the_budget_is_the_bytes_of_all_slots() -> None:
    assert MemoryPlan((2, 3), EXPERT_BYTES, CHUNK_BYTES).budget_bytes == 50
