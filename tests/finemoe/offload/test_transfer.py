"""Expert cache, prefetch requests and transfer queues, against a naive model of them."""

import itertools
from collections import deque
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from finemoe.offload.cache import NOBODY, ExpertCache
from finemoe.offload.policy import ExpertId, ModelShape
from finemoe.offload.transfer import Chunk, PrefetchQueue, Traffic, TransferQueue
from tests.finemoe.offload.states import State, state

SHAPE = ModelShape(layers=2, experts=3, top_k=1, hidden_size=1)
EXPERTS = list(range(SHAPE.size))
EXPERT_BYTES = 10
DEPTH = 2

experts = st.sampled_from(EXPERTS)
priorities = st.sampled_from([0.1, 0.2, 0.3])


@dataclass(eq=False)
class Load:
    expert: int
    urgent: bool
    priority: float
    order: int
    slotted: bool = False
    cancelled: bool = False
    sent: int = 0
    done: int = 0
    prefetched: int = 0

    @property
    def unsent(self) -> bool:
        return self.sent < EXPERT_BYTES

    @property
    def rank(self) -> tuple[float, int]:
        return -self.priority, self.expert


class Model:
    """What ought to happen; every question is answered by looking at every load."""

    def __init__(self, slots: list[int], chunk_bytes: int) -> None:
        self.slots = slots
        self.chunk_bytes = chunk_bytes
        self.keys = dict.fromkeys(EXPERTS, 0.0)
        self.loads: dict[int, Load] = {}
        self.unused_bytes: dict[int, int] = {}  # of every resident
        self.pinned: set[int] = set()
        self.protected: set[int] = set()
        self.traffic = Traffic()
        self.orders = itertools.count()

    def device(self, expert: int) -> int:
        return expert % len(self.slots)

    def loads_of(self, device: int) -> list[Load]:
        return [load for load in self.loads.values() if self.device(load.expert) == device]

    def waiting(self, device: int) -> list[Load]:
        """Demanded loads with bytes left to send, in the order they were demanded."""
        urgent = [load for load in self.loads_of(device) if load.urgent and load.unsent]
        return sorted(urgent, key=lambda load: load.order)

    def wanted(self, device: int) -> list[Load]:
        """Prefetches with bytes left to send, the next one first."""
        loads = [x for x in self.loads_of(device) if not x.urgent and not x.cancelled and x.unsent]
        return sorted(loads, key=lambda load: load.rank)

    def evictable(self, device: int, urgent: bool) -> list[int]:
        residents = [e for e in EXPERTS if e in self.unused_bytes and self.device(e) == device]
        movable = [e for e in residents if e not in self.pinned]
        unprotected = [e for e in movable if e not in self.protected]
        if urgent:
            return unprotected or movable
        return [e for e in unprotected if self.keys[e] > -np.inf]

    def free_slots(self, device: int) -> int:
        held = [expert for expert in self.unused_bytes if self.device(expert) == device]
        return self.slots[device] - len(held) - sum(x.slotted for x in self.loads_of(device))

    def idle_partials(self, device: int) -> list[Load]:
        loads = [x for x in self.loads_of(device) if x.slotted and not x.urgent]
        return [x for x in loads if not x.cancelled and x.done == x.sent]

    def prefetch(self, expert: int, priority: float) -> None:
        load = self.loads.get(expert)
        if expert in self.unused_bytes or (load and load.urgent):
            return
        load = self.loads.setdefault(expert, Load(expert, False, priority, 0))
        load.priority, load.cancelled = priority, False

    def activate(self, expert: int) -> None:
        self.pinned.add(expert)
        if expert in self.unused_bytes:
            self.unused_bytes[expert] = 0
            return
        load = self.loads.setdefault(expert, Load(expert, True, 0.0, 0))
        load.urgent, load.cancelled, load.order = True, False, next(self.orders)

    def cancel(self, expert: int) -> None:
        load = self.loads.get(expert)
        if load and not load.urgent:
            load.cancelled = True
            self.drop_if_over(load)

    def drop_if_over(self, load: Load) -> None:
        if load.cancelled and load.done == load.sent:
            self.traffic.wasted += load.prefetched
            del self.loads[load.expert]

    def next_chunk(self, device: int) -> tuple[int, int, int, bool] | None:
        load = self.next_load(device)
        if load is None:
            return None
        if not load.slotted:
            self.take_slot(load)
        start = load.sent
        load.sent = EXPERT_BYTES if load.urgent else min(start + self.chunk_bytes, EXPERT_BYTES)
        if load.urgent:
            self.traffic.on_demand += load.sent - start
        else:
            self.traffic.prefetched += load.sent - start
            load.prefetched += load.sent - start
        return load.expert, start, load.sent, load.urgent

    def next_load(self, device: int) -> Load | None:
        waiting = self.waiting(device)
        queue = waiting or self.wanted(device)
        urgent = bool(waiting)
        begun = [load for load in waiting if load.slotted]
        if begun:
            return begun[0]
        if self.free_slots(device) or self.evictable(device, urgent):
            return queue[0] if queue else None
        if not urgent:
            return next((load for load in queue if load.slotted), None)
        idle = self.idle_partials(device)
        if not idle:
            return None
        weakest = max(idle, key=lambda load: load.rank)
        weakest.cancelled = True
        self.drop_if_over(weakest)
        return waiting[0]

    def take_slot(self, load: Load) -> None:
        device = self.device(load.expert)
        if not self.free_slots(device):
            evictable = self.evictable(device, load.urgent)
            victim = max(evictable, key=lambda expert: self.keys[expert])
            self.traffic.wasted += self.unused_bytes.pop(victim)
        load.slotted = True

    def chunk_done(self, expert: int, stop: int) -> bool:
        load = self.loads[expert]
        load.done = stop
        if stop < EXPERT_BYTES:
            self.drop_if_over(load)
            return False
        del self.loads[expert]
        self.unused_bytes[expert] = 0 if load.urgent else load.prefetched
        return True


class TransferMachine(RuleBasedStateMachine):
    """Requests, gates, cancellations and up to two chunks in flight on every link."""

    @initialize(
        slots=st.lists(st.integers(1, 2), min_size=1, max_size=4),
        chunk_bytes=st.sampled_from([3, 4, 5, 16]),
    )
    def start(self, slots: list[int], chunk_bytes: int) -> None:
        self.model = Model(slots, chunk_bytes)
        self.cache = ExpertCache(SHAPE, slots, self.eviction_keys)
        self.prefetches = PrefetchQueue(self.cache)
        self.queues = [
            TransferQueue(self.cache, self.prefetches, device, EXPERT_BYTES, chunk_bytes)
            for device in range(len(slots))
        ]
        self.in_flight: list[deque[Chunk]] = [deque() for _ in slots]

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> NDArray[np.float64]:
        return np.array([self.model.keys[expert] for expert in EXPERTS]).reshape(2, 3)

    def queue(self, expert: int) -> TransferQueue:
        return self.queues[self.model.device(expert)]

    @rule(expert=experts, key=st.sampled_from([-np.inf, 0.0, 1.0, 2.0]))
    def rank(self, expert: int, key: float) -> None:
        self.model.keys[expert] = key

    @rule(marked=st.sets(experts, max_size=2))
    def protect(self, marked: set[int]) -> None:
        self.model.protected = marked
        self.cache.protected[:] = [expert in marked for expert in EXPERTS]

    @rule(expert=experts, priority=priorities)
    def prefetch(self, expert: int, priority: float) -> None:
        self.prefetch_all([priority * (other == expert) for other in EXPERTS])

    @rule(expert=experts, priority=priorities, chunks=st.integers(1, 2))
    def half_copy(self, expert: int, priority: float, chunks: int) -> None:
        """Let a prefetch overtake all others for a while, so that several are half copied."""
        self.prefetch(expert, 1.0)
        self.drive(self.model.device(expert), [True, False] * chunks)
        self.prefetch(expert, priority)

    @rule(expert=experts)
    def activate(self, expert: int) -> None:
        if expert in self.model.pinned:
            return
        self.cache.pin(expert)
        self.queue(expert).used(expert)
        if state(self.cache, expert) is not State.RESIDENT:
            self.queue(expert).demand(expert)
        self.model.activate(expert)

    @rule(
        table=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), min_size=6, max_size=6),
        start=st.sampled_from([0, 3]),
    )
    def prefetch_all(self, table: list[float], start: int = 0) -> None:
        self.prefetches.request(np.array(table), start)
        for queue in self.queues:
            queue.prioritize(np.array(table), start)
        for expert, priority in enumerate(table):
            if priority and expert >= start:
                self.model.prefetch(expert, priority)

    @rule(layer=st.integers(0, 1), but=st.sets(st.integers(0, 2)))
    def cancel_layer(self, layer: int, but: set[int]) -> None:
        """As a gate does: what it chose of a layer is demanded if it is not there."""
        self.prefetches.drop_layer(layer)
        for queue in self.queues:
            queue.cancel_layer(layer, but)
        for expert in EXPERTS:
            if expert // 3 == layer and expert % 3 not in but:
                self.model.cancel(expert)
            elif expert // 3 == layer:
                self.activate(expert)

    @precondition(lambda self: bool(self.releasable()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.sampled_from(self.releasable())))

    @rule(pick=st.integers(0, 3), moves=st.lists(st.booleans(), min_size=1, max_size=8))
    def drive(self, pick: int, moves: list[bool]) -> None:
        device = pick % len(self.queues)
        for begin in moves:
            if begin and len(self.in_flight[device]) < DEPTH:
                self.begin_chunk(device)
            elif not begin and self.in_flight[device]:
                self.finish_chunk(device)

    def begin_chunk(self, device: int) -> bool:
        expected = self.model.next_chunk(device)
        chunk = self.queues[device].next_chunk()
        if chunk is None:
            assert expected is None
            return False
        assert (chunk.flat, chunk.start, chunk.stop, chunk.urgent) == expected
        assert self.cache.slot(chunk.flat) == chunk.slot
        assert state(self.cache, chunk.flat) is State.LOADING
        self.in_flight[device].append(chunk)
        return True

    def finish_chunk(self, device: int) -> None:
        chunk = self.in_flight[device].popleft()
        assert self.cache.slot(chunk.flat) == chunk.slot, "the slot was given away in flight"
        loaded = self.queues[device].chunk_done(chunk)
        assert loaded == self.model.chunk_done(chunk.flat, chunk.stop)

    def releasable(self) -> list[int]:
        return sorted(self.model.pinned & self.model.unused_bytes.keys())

    def release_one(self, expert: int) -> None:
        self.cache.unpin(expert)
        self.model.pinned.remove(expert)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check_integrity()
        assert self.cache.occupied <= sum(self.model.slots)
        for device, first in enumerate(self.prefetches.first):
            assert first == next((one.expert for one in self.model.wanted(device)), NOBODY)
        for expert in EXPERTS:
            load = self.model.loads.get(expert)
            wanted = load is not None and not load.cancelled
            assert self.queue(expert).requested(expert) == wanted
            assert state(self.cache, expert) is self.expected_state(expert)

    def expected_state(self, expert: int) -> State:
        if expert in self.model.unused_bytes:
            return State.RESIDENT
        load = self.model.loads.get(expert)
        return State.LOADING if load is not None and load.slotted else State.ABSENT

    @invariant()
    def counts_every_byte_once(self) -> None:
        assert sum((queue.traffic for queue in self.queues), Traffic()) == self.model.traffic
        assert self.model.traffic.wasted <= self.model.traffic.prefetched

    def teardown(self) -> None:
        if hasattr(self, "queues"):
            self.serve_every_demand()
            self.agrees_with_the_model()
            self.counts_every_byte_once()

    def serve_every_demand(self) -> None:
        """Copy until nothing moves, and release residents one by one, until all demands are met."""
        while True:
            for device in range(len(self.queues)):
                self.copy_until_idle(device)
            if self.model.pinned <= self.model.unused_bytes.keys():
                return
            releasable = self.releasable()
            assert releasable, "demands wait for each other"
            self.release_one(releasable[0])

    def copy_until_idle(self, device: int) -> None:
        moving = True
        while moving or self.in_flight[device]:
            moving = len(self.in_flight[device]) < DEPTH and self.begin_chunk(device)
            if self.in_flight[device] and not moving:
                self.finish_chunk(device)
                moving = True


TransferMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40)
TestTransfersAgainstModel = TransferMachine.TestCase


def test_a_demand_takes_the_slot_of_the_weakest_half_copied_prefetch() -> None:
    cache = ExpertCache(SHAPE, (2,), lambda incoming, urgent: np.zeros((2, 3)))
    prefetches = PrefetchQueue(cache)
    queue = TransferQueue(cache, prefetches, 0, EXPERT_BYTES, chunk_bytes=4)
    for expert, priority in ((0, 0.2), (1, 0.9)):
        prefetches.put(expert, priority)
        chunk = queue.next_chunk()
        assert chunk is not None
        assert not queue.chunk_done(chunk)
    queue.demand(2)
    chunk = queue.next_chunk()
    assert chunk is not None
    assert chunk.flat == 2
    assert [state(cache, one) for one in (0, 1)] == [State.ABSENT, State.LOADING]
