"""Where the experts are and where they should be: one cache, one queue per link, one policy's keys.

Both runtimes drive this object and nothing below it; the caller holds the lock, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finemoe.offload.cache import ExpertCache
from finemoe.offload.policy import (
    ExpertId,
    Iteration,
    LayerOutcome,
    ModelShape,
    Policy,
    PrefetchTable,
    Wishes,
)
from finemoe.offload.transfer import Chunk, Traffic, TransferQueue


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
    """Turns gates and prefetch wishes into cache and queue operations; classifies accesses."""

    def __init__(self, shape: ModelShape, plan: MemoryPlan, policy: Policy) -> None:
        self.shape = shape
        self.plan = plan
        self.policy = policy
        self.experts = [
            [ExpertId(layer, index) for index in range(shape.experts)]
            for layer in range(shape.layers)
        ]
        self.cache = ExpertCache(
            shape, plan.slots, policy.eviction_keys, policy.on_evict, policy.eviction_floor
        )
        self.queues = [
            TransferQueue(self.cache, device, plan.expert_bytes, plan.chunk_bytes)
            for device in range(len(plan.slots))
        ]
        self._queue_of = [
            [self.queues[self.cache.device_of(expert)] for expert in layer]
            for layer in self.experts
        ]
        self._progress = (-1, -1)

    def preload(self) -> list[ExpertId]:
        """Make residents of the first experts of every device, as many as fit, and return them."""
        chosen = []
        for expert in self.shape.all_experts():
            if self.cache.has_room(expert):
                self.cache.reserve(expert, urgent=True)
                self.cache.loaded(expert)
                chosen.append(expert)
        return chosen

    def begin_iteration(self, iteration: Iteration) -> None:
        self._progress = (iteration.number, -1)

    def gate(self, iteration: Iteration, layer: int, activated: Sequence[int]) -> LayerOutcome:
        """Pin what the gate chose, demand what is missing, and cancel the layer's other prefetches.

        Every activated expert stays pinned until `release`.
        """
        self._progress = (iteration.number, layer)
        experts, queues = self.experts[layer], self._queue_of[layer]
        hits: list[int] = []
        late: list[int] = []
        misses: list[int] = []
        resident = self.cache.residents
        for index in activated:
            expert = experts[index]
            if expert in resident:
                hits.append(index)
                queues[index].used(expert)
            else:
                (late if queues[index].requested(expert) else misses).append(index)
            self.cache.pin(expert)
        for queue in self.queues:
            queue.cancel_layer(layer, activated)
        for index in (*late, *misses):
            queues[index].demand(experts[index])
        outcome = LayerOutcome(iteration, layer, tuple(hits), tuple(late), tuple(misses))
        self.policy.on_outcome(outcome)
        return outcome

    def prefetch(self, iteration_number: int, wishes: Wishes) -> int:
        """Queue wishes made for an iteration, dropping those whose layer's gate already spoke.

        Returns how many were still in time.
        """
        number, layer = self._progress
        if iteration_number < number:
            return 0
        last_gone = layer if iteration_number == number else -1
        if isinstance(wishes, PrefetchTable):
            return self._prefetch_table(wishes, last_gone + 1)
        in_time, resident, queue_of = 0, self.cache.residents, self._queue_of
        for expert, priority in wishes:
            if expert.layer > last_gone:
                in_time += 1
                if expert not in resident:
                    queue_of[expert.layer][expert.index].prefetch(expert, priority)
        return in_time

    def _prefetch_table(self, wishes: PrefetchTable, first: int) -> int:
        """Queue the wishes for layers from `first` on; return how many there are."""
        due = wishes.priorities.copy()
        due[:first] = 0
        for device, queue in enumerate(self.queues):
            queue.prefetch_all(self.cache.share(due, device))
        return int(np.count_nonzero(due))

    @property
    def settled(self) -> bool:
        """Whether no link has anything left that it could copy now."""
        return all(queue.settled for queue in self.queues)

    @property
    def holds_everything(self) -> bool:
        """Whether there is a slot for every expert, so that none ever leaves."""
        return sum(self.plan.slots) == self.shape.layers * self.shape.experts

    def is_pinned(self, expert: ExpertId) -> bool:
        return self.cache.is_pinned(expert)

    def release(self, expert: ExpertId) -> bool:
        """Unpin an expert whose layer is done with it; tell whether its link waits for a slot."""
        self.cache.unpin(expert)
        return self._queue(expert).retry()

    def next_chunk(self, device: int) -> Chunk | None:
        return self.queues[device].next_chunk()

    def chunk_done(self, device: int, chunk: Chunk) -> ExpertId | None:
        loaded = self.queues[device].chunk_done(chunk)
        if loaded is not None:
            self.policy.on_load(loaded)
        return loaded

    def traffic(self) -> Traffic:
        """Return the bytes that crossed all links so far."""
        return sum((queue.traffic for queue in self.queues), Traffic())

    def _queue(self, expert: ExpertId) -> TransferQueue:
        return self._queue_of[expert.layer][expert.index]
