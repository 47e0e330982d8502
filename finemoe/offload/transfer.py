"""What one link copies next, as a plain state machine over the expert cache.

On-demand loads go first, in the order they were asked for, then prefetches by priority. Experts are
copied in chunks, so an on-demand load waits for the chunks in flight and no longer (section 4.5 of
the paper). A load takes its slot when its first chunk is due, so residents stay useful until then.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from finemoe.offload.cache import ExpertCache, Slot, State
from finemoe.offload.policy import ExpertId


class Chunk(NamedTuple):
    """Bytes [start, stop) of an expert's block, to be copied into its slot."""

    expert: ExpertId
    slot: Slot
    start: int
    stop: int
    urgent: bool


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


@dataclass(eq=False, slots=True)
class _Transfer:
    expert: ExpertId
    urgent: bool
    priority: float
    ticket: int
    slot: Slot | None = None
    sent: int = 0
    done: int = 0
    prefetched: int = 0
    cancelled: bool = False

    @property
    def in_flight(self) -> bool:
        return self.done < self.sent


class TransferQueue:
    """Transfers of one link: queued, under way, or cancelled with a chunk still in flight."""

    def __init__(self, cache: ExpertCache, expert_bytes: int, chunk_bytes: int) -> None:
        self.traffic = Traffic()
        self.starved = False
        """Whether the last call of `next_chunk` found transfers but no slot for them."""
        self._cache = cache
        self._expert_bytes = expert_bytes
        self._chunk_bytes = chunk_bytes
        self._transfers: dict[ExpertId, _Transfer] = {}
        self._urgent: dict[ExpertId, _Transfer] = {}
        self._order: list[tuple[float, int, ExpertId]] = []
        self._unordered: list[_Transfer] = []
        self._tickets = itertools.count()
        self._unused: dict[ExpertId, int] = {}

    @property
    def settled(self) -> bool:
        """Whether nothing is under way and nothing queued can get a slot."""
        if not self._transfers:
            return True
        return self.starved and not any(t.in_flight for t in self._transfers.values())

    def retry(self) -> bool:
        """Note that a slot may have become free; tell whether transfers waited for one."""
        starved, self.starved = self.starved, False
        return starved

    def requested(self, expert: ExpertId) -> bool:
        """Tell whether a copy of `expert` is queued or under way, and wanted."""
        transfer = self._transfers.get(expert)
        return transfer is not None and not transfer.cancelled

    def prefetch(self, expert: ExpertId, priority: float) -> None:
        """Queue a prefetch, or give a queued one its new priority."""
        transfer = self._transfers.get(expert)
        if transfer is None:
            if self._cache.state(expert) is not State.ABSENT:
                return
            transfer = self._transfers[expert] = _Transfer(expert, False, priority, -1)
        elif transfer.urgent:
            return
        self.starved = False
        transfer.cancelled = False
        transfer.priority, transfer.ticket = priority, next(self._tickets)
        self._unordered.append(transfer)

    def demand(self, expert: ExpertId) -> None:
        """Queue an on-demand load, or promote a prefetch of the same expert to one."""
        transfer = self._transfers.get(expert)
        if transfer is None:
            transfer = self._transfers[expert] = _Transfer(expert, True, 0.0, -1)
        self.starved = False
        transfer.urgent, transfer.cancelled = True, False
        if transfer.sent < self._expert_bytes:
            self._urgent[expert] = transfer

    def cancel(self, expert: ExpertId) -> None:
        """Drop a prefetch; one with a chunk in flight ends when that chunk is done."""
        transfer = self._transfers.get(expert)
        if transfer is None or transfer.urgent:
            return
        transfer.cancelled = True
        if not transfer.in_flight:
            self._drop(transfer)

    def queued_of_layer(self, layer: int) -> list[ExpertId]:
        """Return the experts of `layer` whose prefetch is queued or under way."""
        if not self._transfers:
            return []
        return [e for e, t in self._transfers.items() if e.layer == layer and not t.cancelled]

    def next_chunk(self) -> Chunk | None:
        """Return the chunk to copy now, taking a slot if it is a first one; None to wait."""
        return self._next(self._chunk_bytes)

    def next_span(self) -> Chunk | None:
        """Return all chunks that follow one another if nothing intervenes; see `cut`."""
        return self._next(self._expert_bytes)

    def cut(self, span: Chunk, stop: int) -> Chunk:
        """Take back the bytes of a prefetch's span from `stop` on, which were not sent."""
        transfer = self._transfers[span.expert]
        transfer.sent = stop
        transfer.prefetched -= span.stop - stop
        self.traffic.prefetched -= span.stop - stop
        if transfer.urgent:
            self._urgent[span.expert] = transfer
        elif not transfer.cancelled:
            heapq.heappush(self._order, (-transfer.priority, transfer.ticket, span.expert))
        return span._replace(stop=stop)

    def gives_way(self, span: Chunk) -> bool:
        """Tell whether something else than the rest of a prefetch's span is to be copied now."""
        transfer = self._transfers[span.expert]
        if self._urgent or transfer.urgent or transfer.cancelled:
            return True
        if not self._order and not self._unordered:
            return False
        best = self._best_prefetch()
        return best is not None and (-best.priority, best.ticket) < (
            -transfer.priority,
            transfer.ticket,
        )

    def _next(self, at_most: int) -> Chunk | None:
        if not self._transfers:
            self.starved = False
            return None
        transfer = self._next_urgent() if self._urgent else self._next_prefetch()
        self.starved = transfer is None
        if transfer is None:
            return None
        assert transfer.slot is not None
        start = transfer.sent
        stop = min(start + at_most, self._expert_bytes)
        transfer.sent = stop
        if transfer.urgent:
            self.traffic.on_demand += stop - start
            if stop == self._expert_bytes:
                del self._urgent[transfer.expert]
        else:
            self.traffic.prefetched += stop - start
            transfer.prefetched += stop - start
        return Chunk(transfer.expert, transfer.slot, start, stop, transfer.urgent)

    def chunk_done(self, chunk: Chunk) -> ExpertId | None:
        """Note that a chunk arrived, oldest first; return the expert it made resident."""
        transfer = self._transfers[chunk.expert]
        transfer.done = chunk.stop
        if transfer.done == self._expert_bytes:
            del self._transfers[chunk.expert]
            self._cache.loaded(chunk.expert)
            if not transfer.urgent:
                self._unused[chunk.expert] = transfer.prefetched
            return chunk.expert
        if transfer.cancelled and not transfer.in_flight:
            self._drop(transfer)
        return None

    def used(self, expert: ExpertId) -> None:
        """Note that a gate asked for `expert`, so that its prefetch was not wasted."""
        self._unused.pop(expert, None)

    def _next_urgent(self) -> _Transfer | None:
        # One that was begun is finished first: it is not preempted and needs no slot any more.
        for transfer in self._urgent.values():
            if transfer.slot is not None:
                return transfer
        for transfer in self._urgent.values():
            if self._take_slot(transfer):
                return transfer
        weakest = self._weakest_partial()
        if weakest is None:
            return None
        self._drop(weakest)
        first = next(iter(self._urgent.values()))
        return first if self._take_slot(first) else None

    def _next_prefetch(self) -> _Transfer | None:
        best = self._best_prefetch()
        if best is None:
            return None
        if best.slot is not None or self._take_slot(best):
            return best
        return self._strongest_partial()

    def _best_prefetch(self) -> _Transfer | None:
        if self._unordered:
            self._put_in_order()
        while self._order and not self._is_current(self._order[0]):
            heapq.heappop(self._order)
        return self._transfers[self._order[0][2]] if self._order else None

    def _put_in_order(self) -> None:
        """Take in new priorities; many at once, or many outdated entries, make a new heap."""
        if len(self._order) + len(self._unordered) > len(self._transfers) + 8:
            self._order = [
                (-t.priority, t.ticket, t.expert)
                for t in self._transfers.values()
                if not t.urgent and not t.cancelled and t.sent < self._expert_bytes
            ]
            heapq.heapify(self._order)
        else:
            for t in self._unordered:
                heapq.heappush(self._order, (-t.priority, t.ticket, t.expert))
        self._unordered.clear()

    def _is_current(self, entry: tuple[float, int, ExpertId]) -> bool:
        _, ticket, expert = entry
        transfer = self._transfers.get(expert)
        if transfer is None or transfer.ticket != ticket or transfer.cancelled or transfer.urgent:
            return False
        return transfer.sent < self._expert_bytes

    def _partials(self) -> list[_Transfer]:
        return [t for t in self._transfers.values() if t.slot and not t.urgent and not t.cancelled]

    def _strongest_partial(self) -> _Transfer | None:
        unsent = [t for t in self._partials() if t.sent < self._expert_bytes]
        return min(unsent, key=lambda t: (-t.priority, t.ticket), default=None)

    def _weakest_partial(self) -> _Transfer | None:
        idle = [t for t in self._partials() if not t.in_flight]
        return max(idle, key=lambda t: (-t.priority, t.ticket), default=None)

    def _take_slot(self, transfer: _Transfer) -> bool:
        reservation = self._cache.reserve(transfer.expert, transfer.urgent)
        if reservation is None:
            return False
        transfer.slot = reservation.slot
        if reservation.evicted is not None:
            self.traffic.wasted += self._unused.pop(reservation.evicted, 0)
        return True

    def _drop(self, transfer: _Transfer) -> None:
        del self._transfers[transfer.expert]
        if transfer.slot is not None:
            self._cache.abandon(transfer.expert)
            self.traffic.wasted += transfer.prefetched
