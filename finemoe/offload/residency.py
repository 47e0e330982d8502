"""Where the experts are and where they should be: one cache, one queue per link, one policy's keys.

Both runtimes drive this object and nothing below it; the caller holds the lock, if there is one.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from finemoe.offload.cache import ExpertCache
from finemoe.offload.policy import (
    Hook,
    Iteration,
    LayerOutcome,
    ModelShape,
    Need,
    Policy,
    Priorities,
    call_hook,
    check_table,
    refused,
)
from finemoe.offload.transfer import Chunk, PrefetchQueue, Traffic, TransferQueue


@dataclass(frozen=True)
class MemoryPlan:
    """Slots of each device, and the bytes that one expert and one chunk of it take on a link."""

    slots: tuple[int, ...]
    expert_bytes: int
    chunk_bytes: int
    protect: bool = False
    """Whether what a policy asked for, and has or gets, is kept until its layer's gate speaks: it
    leaves for no prefetch, and for an on-demand load last (docs/fidelity.md)."""


class Residency:
    """Turns gates and prefetch requests into cache and queue operations; classifies accesses.

    `flat` is an expert's index among all, l * J + j. Whatever may give a link that sleeps something
    to do calls `wake` itself, so that no caller can forget it. Raises PolicyError for a hook that
    raises and for an answer that cannot be used.
    """

    def __init__(self, shape: ModelShape, plan: MemoryPlan, policy: Policy) -> None:
        self.wake: Callable[[], object] = lambda: None
        self.shape = shape
        self.plan = plan
        self.policy = policy
        idle = getattr(policy.on_evict, "__func__", None) is Policy.on_evict
        on_evict = None if idle else policy.on_evict
        keeps = policy.placement.displaces_less
        self.cache = ExpertCache(shape, plan.slots, policy.eviction_keys, on_evict, keeps)
        self.experts = self.cache.experts
        self._prefetches = PrefetchQueue(self.cache)
        self.queues = [
            TransferQueue(self.cache, self._prefetches, device, plan.expert_bytes, plan.chunk_bytes)
            for device in range(len(plan.slots))
        ]
        self._iteration = self._layer = -1
        self._awaited: list[int] = []
        """Whom the answer to the last gate has the model wait for, if not for everybody."""

    def preload(self) -> list[int]:
        """Make residents of the first experts of every device, as many as fit; return them."""
        slots = self.plan.slots
        chosen = [n for n in range(self.shape.size) if n // len(slots) < slots[n % len(slots)]]
        for flat in chosen:
            self.cache.reserve(flat, True)
            self.cache.loaded(flat)
        return chosen

    def begin_iteration(self, iteration: Iteration) -> None:
        self._iteration, self._layer, self._awaited = iteration.number, -1, []

    def gate(
        self, iteration: Iteration, layer: int, activated: Sequence[int], tokens: Sequence[int] = ()
    ) -> LayerOutcome:
        """Pin what the gate chose, demand what is missing, and cancel the layer's other prefetches.

        Every activated expert stays pinned until `release`, but for those that the policy has the
        host compute: they take no slot. `tokens` are those of `Need`.
        """
        self._iteration, self._layer, self._awaited = iteration.number, layer, []
        first, queues, cache = layer * self.shape.experts, self.queues, self.cache
        hits: list[int] = []
        late: list[int] = []
        misses: list[int] = []
        for index in activated:
            flat = first + index
            queue = queues[flat % len(queues)]
            if cache.is_resident(flat):
                hits.append(index)
                queue.used(flat)
            elif queue.requested(flat):
                late.append(index)
            else:
                misses.append(index)
            cache.pin(flat)
        host: list[int] = []
        if self.policy.host_experts is not None and (late or misses):
            missing = tuple(sorted(late + misses))
            arriving = tuple(
                i for i in missing if queues[(first + i) % len(queues)].copies(first + i)
            )
            host = self._on_host(Need(iteration, layer, tokens, tuple(hits), missing, arriving))
            for index in host:
                cache.unpin(first + index)
            late = [index for index in late if index not in host]
            misses = [index for index in misses if index not in host]
            activated = [index for index in activated if index not in host]
        self._prefetches.drop_layer(layer)
        if self.plan.protect:
            cache.protected[first : first + self.shape.experts] = False
        for queue in queues:
            if queue.under_way:
                queue.cancel_layer(layer, activated)
        for index in late + misses:
            flat = first + index
            queues[flat % len(queues)].demand(flat)
        outcome = LayerOutcome(
            iteration, layer, tuple(hits), tuple(late), tuple(misses), tuple(host)
        )
        call_hook(self.policy.on_outcome, layer, outcome)
        if self.plan.protect:
            self._look_again()
        elif late or misses:
            self.wake()
        return outcome

    def _on_host(self, need: Need) -> list[int]:
        """Return whom the policy has the host compute, ascending."""
        hook = self.policy.host_experts
        assert hook is not None
        chosen = call_hook(hook, need.layer, need)
        if not isinstance(chosen, Collection) or not all(one in need.missing for one in chosen):
            raise refused(hook, need.layer, f"answered {chosen!r}; give some of {need.missing}")
        return [index for index in need.missing if index in chosen]

    def prefetch(
        self, iteration_number: int, priorities: Priorities | None, hook: Hook, layer: int = -1
    ) -> None:
        """Queue what `hook` answered for an iteration, but for layers whose gate already spoke."""
        if priorities is None:
            return
        shape = (self.shape.layers, self.shape.experts)
        check_table(hook, layer, priorities, shape)
        first = 0
        if iteration_number <= self._iteration:
            first = self._layer + 1 if iteration_number == self._iteration else self.shape.layers
        if self.policy.placement.wraps and layer >= 0:
            priorities, first = self._still_ahead(iteration_number, priorities, layer), 0
        if first == self.shape.layers:
            return
        start, flat = first * self.shape.experts, priorities.reshape(-1)
        # NaN is the largest to argmax, which takes half as long as max.
        largest = flat.item(start + int(flat[start:].argmax()))
        if not largest < math.inf:
            raise refused(hook, layer, "answered an infinite or NaN priority")
        if largest <= 0:
            return
        if self.policy.placement.replaces:
            self._prefetches.clear()
        wanted = self._prefetches.request(flat, start)
        if self.policy.placement.awaits:
            self._awaited = self._most_wanted(priorities, layer, *self.policy.placement.awaits)
        if self.plan.protect:
            self.cache.protected[start:] |= wanted
        for queue in self.queues:
            if queue.under_way:
                queue.prioritize(flat, start)
        self._look_again()

    def _still_ahead(self, number: int, priorities: Priorities, layer: int) -> Priorities:
        """Drop requests for what ran since the gate of `layer` in iteration `number`."""
        ahead = priorities.copy()
        if number == self._iteration:
            ahead[layer + 1 : self._layer + 1] = 0
            return ahead
        ahead[layer + 1 :] = 0
        ahead[: self._layer + 1 if number + 1 == self._iteration else self.shape.layers] = 0
        return ahead

    def _most_wanted(self, priorities: Priorities, layer: int, ahead: int, count: int) -> list[int]:
        """Return up to `count` experts that are requested for the layer so far ahead."""
        target = layer + ahead
        if target >= self.shape.layers:
            return []
        best = (-priorities[target]).argsort(kind="stable")[:count].tolist()
        return [target * self.shape.experts + j for j in best if priorities[target, j] > 0]

    def _look_again(self) -> None:
        """Have links look for something to do that found nothing before."""
        for queue in self.queues:
            queue.starved = False
        self.wake()

    def settled(self) -> bool:
        """Tell whether no link has anything left that it could copy now."""
        for queue in self.queues:
            if not queue.settled():
                return False
        return True

    def arrived(self) -> bool:
        """Tell whether whoever the placement awaits is there, or cannot come now."""
        if self.policy.placement.awaits is None:
            return self.settled()
        queues = self.queues
        for flat in self._awaited:
            queue = queues[flat % len(queues)]
            if queue.requested(flat) and not queue.settled():
                return False
        return True

    @property
    def holds_everything(self) -> bool:
        """Whether there is a slot for every expert, so that none ever leaves."""
        return sum(self.plan.slots) == self.shape.size

    def release(self, flat: int) -> None:
        self.cache.unpin(flat)
        queue = self.queues[flat % len(self.queues)]
        if queue.starved:
            queue.starved = False
            self.wake()

    def next_chunk(self, device: int, demanded: bool = False) -> Chunk | None:
        """Return what a link is to copy now, or None; with `demanded`, on-demand loads alone."""
        queue = self.queues[device]
        return None if demanded and not queue.demanded() else queue.next_chunk()

    def chunk_done(self, device: int, chunk: Chunk) -> bool:
        """Note that a chunk arrived, oldest first; tell whether it made its expert resident."""
        loaded = self.queues[device].chunk_done(chunk)
        if loaded:
            expert = self.experts[chunk.flat]
            call_hook(self.policy.on_load, expert.layer, expert)
        return loaded

    def traffic(self) -> Traffic:
        """Return the bytes that crossed all links so far."""
        return sum((queue.traffic for queue in self.queues), Traffic())
