"""The expert cache: which expert is in which slot of which device, as a plain state machine.

No torch, no clock, no thread: whoever drives it (a live link or a virtual one) holds the lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.hooks import raised, refused, table_fault, told
from finemoe.offload.policy import ExpertId, ModelShape
from finemoe.offload.scans import largest_of


class Slot(NamedTuple):
    """Room for one expert on a device."""

    device: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody calls


EvictionKeys = Callable[[ExpertId], NDArray[np.float64]]
EvictionFloor = Callable[[ExpertId], float]
EvictionListener = Callable[[ExpertId], None]


NOBODY = -1
NO_SLOT = -2
NO_FLOOR = -math.inf


class ExpertCache:
    """Slots of all devices; the expert at place p = l * J + j lives on device p mod devices.

    The bytes in use are `occupied` slots times the bytes of one expert, loading ones included.
    """

    def __init__(
        self,
        shape: ModelShape,
        slots: Sequence[int],
        keys: EvictionKeys,
        evicted: EvictionListener | None = None,
        floor: EvictionFloor | None = None,
    ) -> None:
        """See `Policy` for what is called: `eviction_keys`, `on_evict` and `eviction_floor`.

        A hook that raises, keys of another type and NaN where a key decides are a PolicyError.
        """
        self.shape = shape
        self.slots = tuple(slots)
        self.occupied = 0
        self.peak_occupied = 0
        self.absent = bytearray(b"\1") * shape.size
        """By place, whether an expert has no slot; for reading only."""
        self._devices = len(slots)
        self._keys = keys
        self._evicted = evicted
        self._floor = floor
        self._experts = shape.all_experts()
        self._slot: list[Slot | None] = [None] * shape.size
        self._pins = np.zeros(shape.size, dtype=np.int32)
        self._resident = bytearray(shape.size)
        self._free = [
            [Slot(device, index) for index in reversed(range(count))]
            for device, count in enumerate(slots)
        ]
        # Who may leave now: places, in no order, from a device's own start to its stop.
        self._leavers = np.empty(sum(slots), dtype=np.int32)
        self._starts = np.cumsum([0, *slots[:-1]], dtype=np.int32)
        self._stops = self._starts.copy()
        self._turn = np.full(shape.size, -1, dtype=np.int32)
        """Where each expert stands among them; -1 if it does not."""
        self._seen_keys: object = object()
        self._flat_keys: NDArray[np.float64] = np.empty(0)

    def device_of(self, place: int) -> int:
        return place % self._devices

    def is_resident(self, place: int) -> bool:
        return bool(self._resident[place])

    def slot(self, place: int) -> Slot:
        """Return the slot of a loading or resident expert; ValueError if it is absent."""
        slot = self._slot[place]
        if slot is None:
            raise ValueError(f"{self._experts[place]} has no slot")
        return slot

    def has_room(self, device: int) -> bool:
        """Tell whether a device has a free slot."""
        return bool(self._free[device])

    def reserve(self, place: int, urgent: bool) -> int:
        """Take a slot for an absent expert, evicting if none is free.

        Returns the place of who had to leave, NOBODY, or NO_SLOT if none can be had.
        """
        if not self.absent[place]:
            raise ValueError(f"{self._experts[place]} already has a slot")
        free = self._free[place % self._devices]
        if free:
            victim = NOBODY
        else:
            victim = self._victim(place, urgent)
            if victim < 0:
                return NO_SLOT
            self._remove(victim)
            if self._evicted is not None:
                gone = self._experts[victim]
                told(self._evicted, gone.layer, (gone,))
        slot = free.pop()
        self._slot[place] = slot
        self.absent[place] = False
        self.occupied += 1
        if self.occupied > self.peak_occupied:
            self.peak_occupied = self.occupied
        return victim

    def loaded(self, place: int) -> None:
        """Turn a loading expert into a resident one."""
        self._check_loading(place)
        self._resident[place] = True
        if not self._pins[place]:
            self._let_go(place)

    def abandon(self, place: int) -> None:
        """Give back the slot of a loading expert."""
        self._check_loading(place)
        self._remove(place)

    def pin(self, place: int) -> None:
        """Keep an expert from eviction until it is unpinned as often; it may still be absent."""
        self._pins[place] += 1
        self._hold(place)

    def is_pinned(self, place: int) -> bool:
        return bool(self._pins[place] > 0)

    def unpin(self, place: int) -> None:
        """Take one pin back; ValueError if there is none."""
        if not self._pins[place]:
            raise ValueError(f"{self._experts[place]} is not pinned")
        self._pins[place] -= 1
        if not self._pins[place] and self._resident[place]:
            self._let_go(place)

    def check_integrity(self) -> None:
        """Raise AssertionError if slots, states and pins contradict each other."""
        placed = {place: slot for place, slot in enumerate(self._slot) if slot}
        taken = set(placed.values())
        assert len(taken) == len(placed) == self.occupied, "two experts share a slot"
        for device, count in enumerate(self.slots):
            held = {slot for slot in taken if slot.device == device}
            assert held.isdisjoint(self._free[device]), "a taken slot is free"
            assert len(held) + len(self._free[device]) == count, "slots were lost"
        for place, slot in placed.items():
            assert slot.device == self.device_of(place), "an expert is on a foreign device"
        for place in range(self.shape.size):
            assert self.absent[place] == (place not in placed), "an absent expert has a slot"
            assert not (self._resident[place] and self.absent[place]), "a resident has no slot"
            may_go = bool(self._resident[place]) and not self._pins[place]
            assert self._may_go(place) == may_go, "pins and evictability disagree"

    def _check_loading(self, place: int) -> None:
        if self.absent[place] or self._resident[place]:
            raise ValueError(f"{self._experts[place]} is not loading")

    def _victim(self, place: int, urgent: bool) -> int:
        """Return whom the load of an expert may evict, or NOBODY."""
        incoming = self._experts[place]
        try:
            keys = self._keys(incoming)
        except Exception as error:
            raise raised(self._keys, incoming.layer, error) from error
        if keys is not self._seen_keys:
            self._take_keys(keys, incoming)
        device = place % self._devices
        start, stop = self._starts[device], self._stops[device]
        victim = largest_of(self._flat_keys, self._leavers, start, stop)
        if victim < 0:
            return victim
        key = self._flat_keys[victim]
        if key != key:
            raise refused(self._keys, incoming.layer, "answered keys that hold NaN for a resident")
        if urgent:
            return victim
        floor = NO_FLOOR if self._floor is None else self._lowest(self._floor, incoming)
        return victim if key > floor else NOBODY

    def _take_keys(self, keys: NDArray[np.float64], incoming: ExpertId) -> None:
        fault = table_fault(keys, (self.shape.layers, self.shape.experts))
        if not fault and not keys.flags.c_contiguous:
            fault = "an array that is not in C order"
        if fault:
            raise refused(self._keys, incoming.layer, f"answered {fault}")
        self._seen_keys, self._flat_keys = keys, keys.reshape(-1)

    def _lowest(self, hook: EvictionFloor, incoming: ExpertId) -> float:
        floor: float = told(hook, incoming.layer, (incoming,))
        try:
            unknown = math.isnan(floor)
        except TypeError:
            unknown = True
        if unknown:
            raise refused(hook, incoming.layer, f"answered {floor!r:.80}; give a number")
        return floor

    def _remove(self, place: int) -> None:
        free, slot = self._free[place % self._devices], self._slot[place]
        assert slot is not None
        free.append(slot)
        self._slot[place] = None
        self._resident[place] = False
        self._hold(place)
        self.absent[place] = True
        self.occupied -= 1

    def _may_go(self, place: int) -> bool:
        turn, device = self._turn[place], place % self._devices
        ours = self._starts[device] <= turn < self._stops[device]
        return bool(ours and self._leavers[turn] == place)

    def _let_go(self, place: int) -> None:
        """Put an expert among those that may leave."""
        device = place % self._devices
        turn = self._stops[device]
        self._leavers[turn] = place
        self._turn[place] = turn
        self._stops[device] = turn + 1

    def _hold(self, place: int) -> None:
        """Take an expert from those that may leave, if it is there; the last takes its turn."""
        turn = self._turn[place]
        if turn < 0:
            return
        device = place % self._devices
        last = self._stops[device] - 1
        moved = self._leavers[last]
        self._leavers[turn] = moved
        self._turn[moved] = turn
        self._turn[place] = -1
        self._stops[device] = last
