"""Where the experts are and where they should be: one cache, one queue per link, one policy's keys.

Both runtimes drive this object and nothing below it; the caller holds the lock, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finemoe.offload.cache import ExpertCache, State
from finemoe.offload.policy import (
    ExpertId,
    Iteration,
    LayerOutcome,
    ModelShape,
    Policy,
    Prefetch,
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
        self.cache = ExpertCache(shape, plan.slots, policy.eviction_keys, policy.on_evict)
        self.queues = [
            TransferQueue(self.cache, plan.expert_bytes, plan.chunk_bytes) for _ in plan.slots
        ]
        self._progress = (-1, -1)

    def preload(self) -> list[ExpertId]:
        """Make residents of the first experts of every device, as many as fit, and return them."""
        chosen = []
        for layer in range(self.shape.layers):
            for index in range(self.shape.experts):
                expert = ExpertId(layer, index)
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
        found: dict[str, list[ExpertId]] = {"hits": [], "late": [], "misses": []}
        for index in activated:
            expert = ExpertId(layer, index)
            found[self._classify(expert)].append(expert)
            self.cache.pin(expert)
            self._queue(expert).used(expert)
        wanted = set(activated)
        for queue in self.queues:
            for expert in queue.queued_of_layer(layer):
                if expert.index not in wanted:
                    queue.cancel(expert)
        for expert in (*found["late"], *found["misses"]):
            self._queue(expert).demand(expert)
        kinds = {name: tuple(e.index for e in experts) for name, experts in found.items()}
        outcome = LayerOutcome(iteration, layer, **kinds)
        self.policy.on_outcome(outcome)
        return outcome

    def prefetch(self, iteration_number: int, wishes: Iterable[Prefetch]) -> int:
        """Queue wishes made for an iteration, dropping those whose layer's gate already spoke.

        Returns how many were still in time.
        """
        in_time = [w for w in wishes if (iteration_number, w.expert.layer) > self._progress]
        for wish in in_time:
            self._queue(wish.expert).prefetch(wish.expert, wish.priority)
        return len(in_time)

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

    def _classify(self, expert: ExpertId) -> str:
        if self.cache.state(expert) is State.RESIDENT:
            return "hits"
        return "late" if self._queue(expert).requested(expert) else "misses"

    def _queue(self, expert: ExpertId) -> TransferQueue:
        return self.queues[self.cache.device_of(expert)]
