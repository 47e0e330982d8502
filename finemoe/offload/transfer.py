"""What one link copies next, as a plain state machine over the expert cache.

On-demand loads go first, in the order they were asked for, then prefetches by priority. Experts are
copied in chunks, so an on-demand load waits for the chunks in flight and no longer (section 4.5 of
the paper). A load takes its slot when its first chunk is due, so residents stay useful until then;
a prefetch is no more than a wish before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.cache import NO_SLOT, ExpertCache, Slot
from finemoe.offload.policy import ExpertId
from finemoe.offload.wishes import WishList


class Chunk:
    """Bytes [start, stop) of an expert's block, to be copied into its slot."""

    place: int
    """Of the expert, l * J + j."""
    slot: Slot
    start: int
    stop: int
    urgent: bool

    def name(self, expert: ExpertId) -> str:
        """Return what a timeline calls it."""
        why = "on demand" if self.urgent else "prefetch"
        return f"{why} {expert.layer}.{expert.index}"


def _chunk(transfer: _Transfer, start: int, stop: int) -> Chunk:
    # Without __init__, whose call would take longer than all else that a compiled queue does.
    chunk = Chunk.__new__(Chunk)
    assert transfer.slot is not None
    chunk.place, chunk.slot = transfer.place, transfer.slot
    chunk.start, chunk.stop = start, stop
    chunk.urgent = transfer.urgent
    return chunk


@dataclass
class Traffic:
    """Bytes that crossed one link, by why they did."""

    prefetched: int = 0
    on_demand: int = 0
    wasted: int = 0
    """Prefetched bytes that were cancelled or evicted before any use."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.prefetched + other.prefetched,
            self.on_demand + other.on_demand,
            self.wasted + other.wasted,
        )

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.prefetched - earlier.prefetched,
            self.on_demand - earlier.on_demand,
            self.wasted - earlier.wasted,
        )


class _Transfer:
    """An expert that is demanded, or of which something was copied."""

    place: int
    urgent: bool
    priority: float
    slot: Slot | None
    sent: int
    done: int
    prefetched: int
    cancelled: bool

    def in_flight(self) -> bool:
        return self.done < self.sent

    def yields_to(self, priority: float, place: int) -> bool:
        """Tell whether another prefetch goes first; see `WishList`."""
        if self.priority != priority:
            return self.priority < priority
        return place < self.place


def _transfer(place: int, urgent: bool, priority: float) -> _Transfer:
    transfer = _Transfer.__new__(_Transfer)
    transfer.place = place
    transfer.urgent = urgent
    transfer.priority = priority
    transfer.slot = None
    transfer.sent = transfer.done = transfer.prefetched = 0
    transfer.cancelled = False
    return transfer


class TransferQueue:
    """Transfers of one link: wished for, under way, or cancelled with a chunk still in flight.

    Experts are named by their places, l * J + j.
    """

    def __init__(
        self, cache: ExpertCache, device: int, expert_bytes: int, chunk_bytes: int
    ) -> None:
        self.starved = False
        """Whether the last call of `next_chunk` found transfers but no slot for them."""
        self._cache = cache
        self._expert_bytes = expert_bytes
        self._chunk_bytes = chunk_bytes
        self._per_layer = cache.shape.experts
        self._devices = len(cache.slots)
        self._prefetched = self._on_demand = self._wasted = 0
        self._wishes = WishList(cache.shape, self._devices, device)
        mine = range(device, cache.shape.size, self._devices)
        # By place // devices.
        self._transfers: list[_Transfer | None] = [None] * len(mine)
        self._unused = np.zeros(len(mine), dtype=np.int64)
        self._under_way: list[_Transfer] = []
        self._urgent: list[_Transfer] = []

    @property
    def traffic(self) -> Traffic:
        """Bytes that crossed the link so far."""
        return Traffic(self._prefetched, self._on_demand, int(self._wasted))

    def settled(self) -> bool:
        """Tell whether nothing is under way and nothing queued can get a slot."""
        if not self._under_way and self._wishes.best() < 0:
            return True
        return self.starved and not self._copying()

    def retry(self) -> bool:
        """Note that a slot may have become free; tell whether transfers waited for one."""
        starved, self.starved = self.starved, False
        return starved

    def requested(self, place: int) -> bool:
        """Tell whether a copy of an expert is queued or under way, and wanted."""
        transfer = self._transfers[place // self._devices]
        if transfer is None:
            return self._wishes.wished(place)
        return not transfer.cancelled

    def prefetch(self, place: int, priority: float) -> None:
        """Queue a prefetch, or give a queued one its new priority."""
        transfer = self._transfers[place // self._devices]
        if transfer is not None:
            self._prefetch_again(transfer, priority)
        elif self._cache.absent[place]:
            self.starved = False
            self._wishes.put(place, priority)

    def prefetch_all(self, table: NDArray[np.float64], layer: int) -> bool:
        """Queue prefetches of this link's experts from `layer` on by priority; 0 leaves one alone.

        `table` is flat, (L * J,), and holds the experts of all links. Tells whether it is finite.
        """
        self.starved = False
        if not self._wishes.put_all(table, self._cache.absent, layer):
            return False
        for transfer in self._under_way:
            if transfer.place < layer * self._per_layer:
                continue
            priority = float(table[transfer.place])
            if transfer.urgent:
                self._wishes.drop(transfer.place)
            elif priority > 0:
                self._prefetch_again(transfer, priority)
        return True

    def _prefetch_again(self, transfer: _Transfer, priority: float) -> None:
        if transfer.urgent:
            return
        self.starved = False
        transfer.cancelled = False
        transfer.priority = priority
        if transfer.sent < self._expert_bytes:
            self._wishes.put(transfer.place, priority)

    def demand(self, place: int) -> None:
        """Queue an on-demand load, or promote a prefetch of the same expert to one."""
        transfer = self._transfers[place // self._devices]
        if transfer is None:
            transfer = _transfer(place, True, 0.0)
            self._begin(transfer)
        self.starved = False
        transfer.urgent, transfer.cancelled = True, False
        self._wishes.drop(place)
        if transfer.sent < self._expert_bytes and transfer not in self._urgent:
            self._urgent.append(transfer)

    def cancel(self, place: int) -> None:
        """Drop a prefetch; one with a chunk in flight ends when that chunk is done."""
        self._wishes.drop(place)
        transfer = self._transfers[place // self._devices]
        if transfer is None or transfer.urgent:
            return
        transfer.cancelled = True
        if not transfer.in_flight():
            self._drop(transfer)

    def cancel_layer(self, layer: int, but: Collection[int]) -> None:
        """Drop the prefetches of a layer's experts; of those whose indices are `but`, only wishes.

        The others have begun to arrive, or are to be demanded now.
        """
        self._wishes.drop_layer(layer)
        if not self._under_way:
            return
        for transfer in self._under_way.copy():
            place = transfer.place
            if place // self._per_layer == layer and place % self._per_layer not in but:
                self.cancel(place)

    def next_chunk(self) -> Chunk | None:
        """Return the chunk to copy now, taking a slot if it is a first one; None to wait."""
        return self._next(self._chunk_bytes)

    def next_span(self) -> Chunk | None:
        """Return all chunks that follow one another if nothing intervenes; see `cut`."""
        return self._next(self._expert_bytes)

    def cut(self, span: Chunk, stop: int) -> None:
        """Take back the bytes of a prefetch's span from `stop` on, which were not sent."""
        transfer = self._transfers[span.place // self._devices]
        assert transfer is not None
        transfer.sent = stop
        transfer.prefetched -= span.stop - stop
        self._prefetched -= span.stop - stop
        if transfer.urgent:
            self._urgent.append(transfer)
        elif not transfer.cancelled:
            self._wishes.put(span.place, transfer.priority)
        span.stop = stop

    def gives_way(self, span: Chunk) -> bool:
        """Tell whether something else than the rest of a prefetch's span is to be copied now."""
        if self._urgent:
            return True
        transfer = self._transfers[span.place // self._devices]
        assert transfer is not None
        if transfer.urgent or transfer.cancelled:
            return True
        best = self._wishes.best()
        return best >= 0 and transfer.yields_to(self._wishes.highest, best)

    def _next(self, at_most: int) -> Chunk | None:
        transfer = self._next_urgent() if self._urgent else self._next_prefetch()
        if transfer is None:
            self.starved = bool(self._under_way) or self._wishes.best() >= 0
            return None
        self.starved = False
        start = transfer.sent
        stop = min(start + at_most, self._expert_bytes)
        transfer.sent = stop
        if transfer.urgent:
            self._on_demand += stop - start
            if stop == self._expert_bytes:
                self._urgent.remove(transfer)
        else:
            self._prefetched += stop - start
            transfer.prefetched += stop - start
            if stop == self._expert_bytes:
                self._wishes.drop(transfer.place)
        return _chunk(transfer, start, stop)

    def chunk_done(self, chunk: Chunk) -> bool:
        """Note that a chunk arrived, oldest first; tell whether it made its expert resident."""
        transfer = self._transfers[chunk.place // self._devices]
        assert transfer is not None
        transfer.done = chunk.stop
        if transfer.done == self._expert_bytes:
            self._end(transfer)
            self._cache.loaded(chunk.place)
            if not transfer.urgent:
                self._unused[chunk.place // self._devices] = transfer.prefetched
            return True
        if transfer.cancelled and not transfer.in_flight():
            self._drop(transfer)
        return False

    def used(self, place: int) -> None:
        """Note that a gate asked for an expert, so that its prefetch was not wasted."""
        self._unused[place // self._devices] = 0

    def _next_urgent(self) -> _Transfer | None:
        # One that was begun is finished first: it is not preempted and needs no slot any more.
        for transfer in self._urgent:
            if transfer.slot is not None:
                return transfer
        for transfer in self._urgent:
            if self._take_slot(transfer):
                return transfer
        weakest = self._weakest_partial()
        if weakest is None:
            return None
        self._drop(weakest)
        first = self._urgent[0]
        return first if self._take_slot(first) else None

    def _next_prefetch(self) -> _Transfer | None:
        place = self._wishes.best()
        if place < 0:
            return None
        begun = self._transfers[place // self._devices]
        if begun is not None:
            return begun
        transfer = _transfer(place, False, self._wishes.highest)
        if not self._take_slot(transfer):
            return self._strongest_partial()
        self._begin(transfer)
        return transfer

    def _copying(self) -> bool:
        for transfer in self._under_way:
            if transfer.in_flight():
                return True
        return False

    def _partials(self) -> list[_Transfer]:
        """Return the half-copied prefetches, the first to go on with first."""
        partial = [t for t in self._under_way if t.slot and not t.urgent and not t.cancelled]
        return sorted(partial, key=lambda t: (-t.priority, t.place))

    def _strongest_partial(self) -> _Transfer | None:
        unsent = (t for t in self._partials() if t.sent < self._expert_bytes)
        return next(unsent, None)

    def _weakest_partial(self) -> _Transfer | None:
        idle = (t for t in reversed(self._partials()) if not t.in_flight())
        return next(idle, None)

    def _take_slot(self, transfer: _Transfer) -> bool:
        evicted = self._cache.reserve(transfer.place, transfer.urgent)
        if evicted >= 0:
            self._wasted += self._unused[evicted // self._devices]
            self._unused[evicted // self._devices] = 0
        elif evicted == NO_SLOT:
            return False
        transfer.slot = self._cache.slot(transfer.place)
        return True

    def _begin(self, transfer: _Transfer) -> None:
        self._transfers[transfer.place // self._devices] = transfer
        self._under_way.append(transfer)

    def _end(self, transfer: _Transfer) -> None:
        self._transfers[transfer.place // self._devices] = None
        under_way = self._under_way
        # By hand: looking up list.remove would take longer than the few that are under way.
        at = 0
        while under_way[at] is not transfer:
            at += 1
        del under_way[at]

    def _drop(self, transfer: _Transfer) -> None:
        """Forget a half-copied prefetch."""
        self._end(transfer)
        self._wishes.drop(transfer.place)
        self._cache.abandon(transfer.place)
        self._wasted += transfer.prefetched
