"""What one link copies next, as a plain state machine over the expert cache.

On-demand loads go first, in the order they were asked for, then prefetches by priority. Experts are
copied in chunks, so an on-demand load waits for the chunks in flight and no longer (section 4.5 of
the paper). A load takes its slot when its first chunk is due, so residents stay useful until then;
a prefetch is no more than a wish before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.cache import ExpertCache, Slot
from finemoe.offload.policy import ExpertId
from finemoe.offload.wishes import WishList


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
    """An expert that is demanded, or of which something was copied."""

    expert: ExpertId
    urgent: bool
    priority: float = 0.0
    slot: Slot | None = None
    sent: int = 0
    done: int = 0
    prefetched: int = 0
    cancelled: bool = False

    @property
    def in_flight(self) -> bool:
        return self.done < self.sent

    @property
    def rank(self) -> tuple[float, ExpertId]:
        """Order among prefetches, the first one lowest; see `WishList`."""
        return -self.priority, self.expert


class TransferQueue:
    """Transfers of one link: wished for, under way, or cancelled with a chunk still in flight."""

    def __init__(
        self, cache: ExpertCache, device: int, expert_bytes: int, chunk_bytes: int
    ) -> None:
        self.traffic = Traffic()
        self.starved = False
        """Whether the last call of `next_chunk` found transfers but no slot for them."""
        self._cache = cache
        self._expert_bytes = expert_bytes
        self._chunk_bytes = chunk_bytes
        self._wishes = WishList(cache.shape, len(cache.slots), device)
        self._absent = cache.absent_on(device)
        self._transfers: dict[ExpertId, _Transfer] = {}
        self._urgent: dict[ExpertId, _Transfer] = {}
        self._unused: dict[ExpertId, int] = {}

    @property
    def settled(self) -> bool:
        """Whether nothing is under way and nothing queued can get a slot."""
        if not self._transfers and not self._wishes.any():
            return True
        return self.starved and not any(t.in_flight for t in self._transfers.values())

    def retry(self) -> bool:
        """Note that a slot may have become free; tell whether transfers waited for one."""
        starved, self.starved = self.starved, False
        return starved

    def requested(self, expert: ExpertId) -> bool:
        """Tell whether a copy of `expert` is queued or under way, and wanted."""
        transfer = self._transfers.get(expert)
        if transfer is None:
            return self._wishes.wished(expert)
        return not transfer.cancelled

    def prefetch(self, expert: ExpertId, priority: float) -> None:
        """Queue a prefetch, or give a queued one its new priority."""
        transfer = self._transfers.get(expert)
        if transfer is not None:
            self._prefetch_again(transfer, priority)
        elif self._cache.is_absent(expert):
            self.starved = False
            self._wishes.put(expert, priority)

    def prefetch_all(self, priorities: NDArray[np.float64]) -> None:
        """Queue prefetches of this link's experts by priority, (experts,); 0 leaves one alone."""
        self.starved = False
        self._wishes.put_all(priorities, (priorities > 0) & self._absent)
        for expert, transfer in self._transfers.items():
            priority = float(priorities[self._wishes.position(expert)])
            if transfer.urgent:
                self._wishes.drop(expert)
            elif priority > 0:
                self._prefetch_again(transfer, priority)

    def _prefetch_again(self, transfer: _Transfer, priority: float) -> None:
        if transfer.urgent:
            return
        self.starved = False
        transfer.cancelled = False
        transfer.priority = priority
        if transfer.sent < self._expert_bytes:
            self._wishes.put(transfer.expert, priority)

    def demand(self, expert: ExpertId) -> None:
        """Queue an on-demand load, or promote a prefetch of the same expert to one."""
        transfer = self._transfers.get(expert)
        if transfer is None:
            transfer = self._transfers[expert] = _Transfer(expert, urgent=True)
        self.starved = False
        transfer.urgent, transfer.cancelled = True, False
        self._wishes.drop(expert)
        if transfer.sent < self._expert_bytes:
            self._urgent[expert] = transfer

    def cancel(self, expert: ExpertId) -> None:
        """Drop a prefetch; one with a chunk in flight ends when that chunk is done."""
        self._wishes.drop(expert)
        transfer = self._transfers.get(expert)
        if transfer is None or transfer.urgent:
            return
        transfer.cancelled = True
        if not transfer.in_flight:
            self._drop(transfer)

    def cancel_layer(self, layer: int, but: Collection[int]) -> None:
        """Drop the prefetches of a layer's experts; of those whose indices are `but`, only wishes.

        The others have begun to arrive, or are to be demanded now.
        """
        self._wishes.drop_layer(layer)
        for expert in [e for e in self._transfers if e.layer == layer and e.index not in but]:
            self.cancel(expert)

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
            self._wishes.put(span.expert, transfer.priority)
        return span._replace(stop=stop)

    def gives_way(self, span: Chunk) -> bool:
        """Tell whether something else than the rest of a prefetch's span is to be copied now."""
        if self._urgent:
            return True
        transfer = self._transfers[span.expert]
        if transfer.urgent or transfer.cancelled:
            return True
        best = self._wishes.best()
        return best is not None and (-best[1], best[0]) < transfer.rank

    def _next(self, at_most: int) -> Chunk | None:
        transfer = self._next_urgent() if self._urgent else self._next_prefetch()
        if transfer is None:
            self.starved = bool(self._transfers) or self._wishes.any()
            return None
        self.starved = False
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
            if stop == self._expert_bytes:
                self._wishes.drop(transfer.expert)
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
        best = self._wishes.best()
        if best is None:
            return None
        expert, priority = best
        begun = self._transfers.get(expert)
        if begun is not None:
            return begun
        transfer = _Transfer(expert, urgent=False, priority=priority)
        if not self._take_slot(transfer):
            return self._strongest_partial()
        self._transfers[expert] = transfer
        return transfer

    def _partials(self) -> list[_Transfer]:
        return [t for t in self._transfers.values() if t.slot and not t.urgent and not t.cancelled]

    def _strongest_partial(self) -> _Transfer | None:
        unsent = [t for t in self._partials() if t.sent < self._expert_bytes]
        return min(unsent, key=lambda t: t.rank, default=None)

    def _weakest_partial(self) -> _Transfer | None:
        idle = [t for t in self._partials() if not t.in_flight]
        return max(idle, key=lambda t: t.rank, default=None)

    def _take_slot(self, transfer: _Transfer) -> bool:
        reservation = self._cache.reserve(transfer.expert, transfer.urgent)
        if reservation is None:
            return False
        transfer.slot, evicted = reservation
        if evicted is not None:
            self.traffic.wasted += self._unused.pop(evicted, 0)
        return True

    def _drop(self, transfer: _Transfer) -> None:
        """Forget a half-copied prefetch."""
        del self._transfers[transfer.expert]
        self._wishes.drop(transfer.expert)
        self._cache.abandon(transfer.expert)
        self.traffic.wasted += transfer.prefetched
