"""Where the experts are and where they should be: one cache, one queue per link, one policy's keys.

Both runtimes drive this object and nothing below it; the caller holds the lock, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finemoe.offload.cache import ExpertCache
from finemoe.offload.eviction import Recency
from finemoe.offload.hooks import Hook, refused, table_fault, told
from finemoe.offload.policy import (
    Iteration,
    LayerOutcome,
    ModelShape,
    Policy,
    PrefetchTable,
    Wishes,
)
from finemoe.offload.transfer import Chunk, Traffic, TransferQueue

INFINITE = math.inf


@dataclass(frozen=True)
class MemoryPlan:
    """Slots of each device, and the bytes that one expert and one chunk of it take on a link."""

    slots: tuple[int, ...]
    expert_bytes: int
    chunk_bytes: int

    @property
    def budget_bytes(self) -> int:
        return sum(self.slots) * self.expert_bytes


class Residency:
    """Turns gates and prefetch wishes into cache and queue operations; classifies accesses.

    Where a method takes a place, it is that of an expert among all, l * J + j. Whatever may give a
    link that sleeps something to do calls `wake` itself, so that no caller can forget it. Raises
    PolicyError for a hook that raises and for an answer that cannot be used.
    """

    def __init__(self, shape: ModelShape, plan: MemoryPlan, policy: Policy) -> None:
        self.wake: Callable[[], object] = _nobody_sleeps
        self.shape = shape
        self.plan = plan
        self.policy = policy
        self.experts = shape.all_experts()
        self._on_outcome = policy.on_outcome
        self._on_load = policy.on_load
        self._recency = None
        if isinstance(policy, Recency) and not _overrides(policy, "on_load", Recency):
            self._recency = policy
        evicted = policy.on_evict if _overrides(policy, "on_evict") else None
        floor = policy.eviction_floor if _overrides(policy, "eviction_floor") else None
        self.cache = ExpertCache(shape, plan.slots, policy.eviction_keys, evicted, floor)
        self.queues = [
            TransferQueue(self.cache, device, plan.expert_bytes, plan.chunk_bytes)
            for device in range(len(plan.slots))
        ]
        self._places = {expert: place for place, expert in enumerate(self.experts)}
        self._table_shape = (shape.layers, shape.experts)
        self._per_layer = shape.experts
        self._devices = len(plan.slots)
        self._iteration = self._layer = -1

    def preload(self) -> list[int]:
        """Make residents of the first experts of every device, as many as fit; return places."""
        chosen = []
        for place in range(self.shape.size):
            if self.cache.has_room(self.cache.device_of(place)):
                self.cache.reserve(place, True)
                self.cache.loaded(place)
                chosen.append(place)
        return chosen

    def begin_iteration(self, iteration: Iteration) -> None:
        self._iteration, self._layer = iteration.number, -1

    def gate(self, iteration: Iteration, layer: int, activated: Sequence[int]) -> LayerOutcome:
        """Pin what the gate chose, demand what is missing, and cancel the layer's other prefetches.

        Every activated expert stays pinned until `release`.
        """
        self._iteration, self._layer = iteration.number, layer
        first = layer * self._per_layer
        hits: list[int] = []
        late: list[int] = []
        misses: list[int] = []
        for index in activated:
            place = first + index
            if self.cache.is_resident(place):
                hits.append(index)
                self._queue(place).used(place)
            elif self._queue(place).requested(place):
                late.append(index)
            else:
                misses.append(index)
            self.cache.pin(place)
        for queue in self.queues:
            queue.cancel_layer(layer, activated)
        for index in late + misses:
            self._queue(first + index).demand(first + index)
        outcome = LayerOutcome(iteration, layer, tuple(hits), tuple(late), tuple(misses))
        told(self._on_outcome, layer, (outcome,))
        if late or misses:
            self.wake()
        return outcome

    def prefetch(
        self, iteration_number: int, wishes: Wishes | None, hook: Hook, layer: int = -1
    ) -> None:
        """Queue wishes made for an iteration, dropping those whose layer's gate already spoke.

        An error names the hook that gave them, and the layer it was asked about.
        """
        first = 0
        if iteration_number <= self._iteration:
            first = self._layer + 1 if iteration_number == self._iteration else self.shape.layers
        if isinstance(wishes, PrefetchTable):
            self._prefetch_table(wishes, first, hook, layer)
        elif isinstance(wishes, (list, tuple)):
            self._prefetch_each(wishes, first, hook, layer)
        elif wishes is not None:
            found = type(wishes).__name__
            what = f"answered {found}; give a list or tuple of Prefetch, or a PrefetchTable"
            raise refused(hook, layer, what)

    def _prefetch_each(self, wishes: Sequence[Any], first: int, hook: Hook, layer: int) -> None:
        in_time = False
        start = first * self._per_layer
        for wish in wishes:
            try:
                expert, priority = wish
                place = self._places[expert]
                known = -INFINITE < priority < INFINITE
            except (TypeError, ValueError, KeyError, OverflowError):
                known = False
            if not known:
                due = f"(layer < {self.shape.layers}, index < {self._per_layer})"
                what = f"answered {wish!r:.80}, no expert {due} with a finite priority"
                raise refused(hook, layer, what)
            if place >= start:
                in_time = True
                if not self.cache.is_resident(place):
                    self._queue(place).prefetch(place, priority)
        if in_time:
            self.wake()

    def _prefetch_table(self, wishes: PrefetchTable, first: int, hook: Hook, layer: int) -> None:
        fault = table_fault(wishes.priorities, self._table_shape)
        if fault:
            raise refused(hook, layer, f"answered a PrefetchTable of {fault}")
        table = wishes.priorities.reshape(-1)
        if first == self.shape.layers:
            return
        for queue in self.queues:
            if not queue.prefetch_all(table, first):
                what = "answered a PrefetchTable with an infinite or NaN priority"
                raise refused(hook, layer, what)
        self.wake()

    def settled(self) -> bool:
        """Tell whether no link has anything left that it could copy now."""
        for queue in self.queues:
            if not queue.settled():
                return False
        return True

    @property
    def holds_everything(self) -> bool:
        """Whether there is a slot for every expert, so that none ever leaves."""
        return sum(self.plan.slots) == self.shape.layers * self.shape.experts

    def is_pinned(self, place: int) -> bool:
        return self.cache.is_pinned(place)

    def release(self, place: int) -> None:
        """Unpin an expert whose layer is done with it."""
        self.cache.unpin(place)
        if self._queue(place).retry():
            self.wake()

    def next_chunk(self, device: int) -> Chunk | None:
        return self._queue(device).next_chunk()

    def chunk_done(self, device: int, chunk: Chunk) -> bool:
        """Note that a chunk arrived, oldest first; tell whether it made its expert resident."""
        loaded = self._queue(device).chunk_done(chunk)
        if not loaded:
            return False
        if self._recency is not None:
            # Hundreds of loads an iteration, with no call of Python for any.
            self._recency.note_load(chunk.place // self._per_layer, chunk.place % self._per_layer)
        else:
            expert = self.experts[chunk.place]
            told(self._on_load, expert.layer, (expert,))
        return True

    def traffic(self) -> Traffic:
        """Return the bytes that crossed all links so far."""
        return sum((queue.traffic for queue in self.queues), Traffic())

    def _queue(self, place: int) -> TransferQueue:
        return self.queues[place % self._devices]


def _nobody_sleeps() -> None:
    pass


def _overrides(policy: Policy, method: str, base: type = Policy) -> bool:
    return getattr(type(policy), method) is not getattr(base, method)
