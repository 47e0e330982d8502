"""What one link copies next, as a plain state machine over the expert cache.

On-demand loads go first, in the order they were asked for, then prefetches by priority. Experts are
copied in chunks, so an on-demand load waits for the chunks in flight and no longer (section 4.5 of
the paper). A load takes its slot when its first chunk is due, so residents stay useful until then;
before, a prefetch is no more than a request. Experts are named by their flat indices.
"""

import operator
from collections.abc import Collection
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.cache import NO_SLOT, NOBODY, ExpertCache, Slot
from finemoe.offload.policy import ExpertId

ZERO = np.zeros(())
"""NumPy compares a small array with an array in a third of the time that a number takes."""


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes [start, stop) of an expert's block, to be copied into its slot."""

    flat: int
    slot: Slot
    start: int
    stop: int
    urgent: bool

    def name(self, expert: ExpertId) -> str:
        why = "on demand" if self.urgent else "prefetch"
        return f"{why} {expert.layer}.{expert.index}"


@dataclass
class Traffic:
    """Bytes that crossed one link, by why they did."""

    prefetched: int = 0
    on_demand: int = 0
    wasted: int = 0  # prefetched bytes that were cancelled or evicted before any use

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(*map(operator.sub, astuple(self), astuple(earlier)))


class PrefetchQueue:
    """The prefetch requests of all links: a priority above 0 for each expert that is requested."""

    def __init__(self, cache: ExpertCache) -> None:
        size, self._devices = cache.shape.size, len(cache.slots)
        self.first = [NOBODY] * self._devices
        """By link, the request of highest priority; of equal ones that of the lowest index."""
        self._per_layer = cache.shape.experts
        self._absent = np.frombuffer(cache.absent, dtype=bool)
        # One column a link, so that one search finds the first of all.
        self._by_link = np.zeros((-(-size // self._devices), self._devices))
        self._of_link = [self._by_link[:, device] for device in range(self._devices)]
        self._priorities = self._by_link.reshape(-1)[:size]

    def priority(self, flat: int) -> float:
        """Return an expert's priority, 0 if it is not requested."""
        return self._priorities.item(flat)

    def request(self, priorities: NDArray[np.float64], start: int) -> NDArray[np.bool_]:
        """Request absent experts from `start` on by priorities (L * J,); the others keep theirs.

        Returns which of the experts from `start` on have a priority.
        """
        asked = priorities[start:]
        wanted: NDArray[np.bool_] = asked > ZERO
        np.putmask(self._priorities[start:], wanted & self._absent[start:], asked)
        self._find_first()
        return wanted

    def clear(self) -> None:
        self._priorities[:] = 0.0

    def put(self, flat: int, priority: float) -> None:
        self._priorities[flat] = priority
        device = flat % self._devices
        self._set_first(device, int(self._of_link[device].argmax()))

    def drop(self, flat: int) -> None:
        device, following = flat % self._devices, flat + self._devices
        if self.first[device] != flat:
            self._priorities[flat] = 0.0
            return
        priority = self._priorities.item(flat)
        self._priorities[flat] = 0.0
        # As where a whole layer is requested.
        if following < len(self._priorities) and self._priorities.item(following) == priority:
            self.first[device] = following
        else:
            self._set_first(device, int(self._of_link[device].argmax()))

    def drop_layer(self, layer: int) -> None:
        if max(self.first) == NOBODY:
            return
        start = layer * self._per_layer
        stop = start + self._per_layer
        self._priorities[start:stop] = 0.0
        for flat in self.first:
            if start <= flat < stop:
                self._find_first()
                return

    def _find_first(self) -> None:
        by_link, devices = self._by_link, self._devices
        self.first = [
            row * devices + device if by_link.item(row, device) > 0 else NOBODY
            for device, row in enumerate(by_link.argmax(axis=0).tolist())
        ]

    def _set_first(self, device: int, row: int) -> None:
        # The last row may end beyond the experts, where nothing is requested.
        found = self._by_link.item(row, device) > 0
        self.first[device] = row * self._devices + device if found else NOBODY


@dataclass(slots=True, eq=False)
class _Transfer:
    """An expert that is demanded, or of which something was copied."""

    flat: int
    urgent: bool
    priority: float
    slot: Slot | None = None
    sent: int = 0
    done: int = 0
    prefetched: int = 0
    cancelled: bool = False

    def in_flight(self) -> bool:
        return self.done < self.sent


class TransferQueue:
    """Transfers of one link: requested, under way, or cancelled with a chunk still in flight."""

    def __init__(
        self,
        cache: ExpertCache,
        prefetches: PrefetchQueue,
        device: int,
        expert_bytes: int,
        chunk_bytes: int,
    ) -> None:
        self.starved = False
        """Whether the last call of `next_chunk` found transfers but no slot for them."""
        self.traffic = Traffic()  # bytes that crossed the link so far
        self.under_way: dict[int, _Transfer] = {}
        self._cache = cache
        self._prefetches = prefetches
        self._device = device
        self._expert_bytes = expert_bytes
        self._chunk_bytes = chunk_bytes
        self._per_layer = cache.shape.experts
        self._urgent: list[_Transfer] = []
        self._unused: dict[int, int] = {}
        """Prefetched bytes of residents that no gate asked for yet."""

    def demanded(self) -> bool:
        """Tell whether an on-demand load, or the rest of one, is still to be copied."""
        return bool(self._urgent)

    def is_empty(self) -> bool:
        return not self.under_way and self._prefetches.first[self._device] == NOBODY

    def settled(self) -> bool:
        """Tell whether nothing is under way and nothing queued can get a slot."""
        if self.is_empty():
            return True
        return self.starved and not any(one.in_flight() for one in self.under_way.values())

    def requested(self, flat: int) -> bool:
        """Tell whether a copy of an expert is wanted, and queued or under way."""
        transfer = self.under_way.get(flat)
        if transfer is None:
            return self._prefetches.priority(flat) > 0
        return not transfer.cancelled

    def copies(self, flat: int) -> bool:
        """Tell whether bytes of an expert are in flight."""
        transfer = self.under_way.get(flat)
        return transfer is not None and transfer.in_flight()

    def prioritize(self, priorities: NDArray[np.float64], start: int) -> None:
        """Note new requests, see `PrefetchQueue.request`; transfers under way go by them too."""
        for flat, transfer in self.under_way.items():
            priority = priorities.item(flat)
            if flat < start or priority <= 0:
                continue
            if transfer.urgent:
                self._prefetches.drop(flat)
                continue
            transfer.cancelled = False
            transfer.priority = priority
            if transfer.sent < self._expert_bytes:
                self._prefetches.put(flat, priority)

    def demand(self, flat: int) -> None:
        """Queue an on-demand load, or promote a prefetch of the same expert to one."""
        transfer = self.under_way.get(flat)
        if transfer is None:
            transfer = self.under_way[flat] = _Transfer(flat, True, 0.0)
        self.starved = False
        transfer.urgent, transfer.cancelled = True, False
        self._prefetches.drop(flat)
        if transfer.sent < self._expert_bytes and transfer not in self._urgent:
            self._urgent.append(transfer)

    def cancel_layer(self, layer: int, but: Collection[int]) -> None:
        """Drop what began to arrive of a layer, but for the indices `but`, and chunks in flight."""
        for flat, transfer in list(self.under_way.items()):
            if flat // self._per_layer != layer or flat % self._per_layer in but or transfer.urgent:
                continue
            transfer.cancelled = True
            self._prefetches.drop(flat)
            if not transfer.in_flight():
                self._drop(transfer)

    def next_chunk(self, whole: bool = False) -> Chunk | None:
        """Return the chunk to copy now, taking a slot if it is a first one; None to wait.

        An on-demand load, which nothing interrupts, is one chunk; with `whole` a prefetch's spans
        all that follow one another if nothing intervenes, see `cut`.
        """
        self.starved = False
        if not self.under_way and self._prefetches.first[self._device] == NOBODY:
            return None
        transfer = self._next_urgent() if self._urgent else self._next_prefetch()
        if transfer is None:
            self.starved = not self.is_empty()
            return None
        assert transfer.slot is not None
        start = transfer.sent
        stop = self._expert_bytes
        if not (whole or transfer.urgent):
            stop = min(stop, start + self._chunk_bytes)
        transfer.sent = stop
        if transfer.urgent:
            self.traffic.on_demand += stop - start
            if stop == self._expert_bytes:
                self._urgent.remove(transfer)
        else:
            self.traffic.prefetched += stop - start
            transfer.prefetched += stop - start
            if stop == self._expert_bytes:
                self._prefetches.drop(transfer.flat)
        return Chunk(transfer.flat, transfer.slot, start, stop, transfer.urgent)

    def cut(self, span: Chunk, stop: int) -> None:
        """Take back the bytes of a prefetch's span from `stop` on, which were not sent."""
        transfer = self.under_way[span.flat]
        transfer.sent = stop
        transfer.prefetched -= span.stop - stop
        self.traffic.prefetched -= span.stop - stop
        if transfer.urgent:
            self._urgent.append(transfer)
        elif not transfer.cancelled:
            self._prefetches.put(span.flat, transfer.priority)
        span.stop = stop

    def gives_way(self, span: Chunk) -> bool:
        """Tell whether something else than the rest of a prefetch's span is to be copied now."""
        transfer = self.under_way[span.flat]
        if self._urgent or transfer.urgent or transfer.cancelled:
            return True
        first = self._prefetches.first[self._device]
        if first == NOBODY:
            return False
        priority = self._prefetches.priority(first)
        return (priority, -first) > (transfer.priority, -span.flat)

    def chunk_done(self, chunk: Chunk) -> bool:
        """Note that a chunk arrived, oldest first; tell whether it made its expert resident."""
        transfer = self.under_way[chunk.flat]
        transfer.done = chunk.stop
        if transfer.done == self._expert_bytes:
            del self.under_way[chunk.flat]
            self._cache.loaded(chunk.flat)
            if not transfer.urgent:
                self._unused[chunk.flat] = transfer.prefetched
            return True
        if transfer.cancelled and not transfer.in_flight():
            self._drop(transfer)
        return False

    def used(self, flat: int) -> None:
        """Note that a gate asked for an expert, so that its prefetch was not wasted."""
        self._unused.pop(flat, None)

    def _next_urgent(self) -> _Transfer | None:
        # One that was begun is finished first: it is not preempted and needs no slot any more.
        for transfer in self._urgent:
            if transfer.slot is not None:
                return transfer
        for transfer in self._urgent:
            if self._take_slot(transfer):
                return transfer
        idle = [transfer for transfer in self._partials() if not transfer.in_flight()]
        if not idle:
            return None
        self._drop(idle[-1])
        first = self._urgent[0]
        return first if self._take_slot(first) else None

    def _next_prefetch(self) -> _Transfer | None:
        flat = self._prefetches.first[self._device]
        if flat == NOBODY:
            return None
        begun = self.under_way.get(flat)
        if begun is not None:
            return begun
        transfer = _Transfer(flat, False, self._prefetches.priority(flat))
        if self._take_slot(transfer):
            self.under_way[flat] = transfer
            return transfer
        unsent = (t for t in self._partials() if t.sent < self._expert_bytes)
        return next(unsent, None)

    def _partials(self) -> list[_Transfer]:
        """Return the half-copied prefetches, the first to go on with first."""
        wanted = (t for t in self.under_way.values() if not t.urgent and not t.cancelled)
        return sorted(wanted, key=lambda t: (-t.priority, t.flat))

    def _take_slot(self, transfer: _Transfer) -> bool:
        victim = self._cache.reserve(transfer.flat, transfer.urgent)
        if victim == NO_SLOT:
            return False
        self.traffic.wasted += self._unused.pop(victim, 0)
        transfer.slot = self._cache.slot(transfer.flat)
        return True

    def _drop(self, transfer: _Transfer) -> None:
        del self.under_way[transfer.flat]
        self._prefetches.drop(transfer.flat)
        self._cache.abandon(transfer.flat)
        self.traffic.wasted += transfer.prefetched
