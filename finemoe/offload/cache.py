"""The expert cache: which expert is in which slot of which device, as a plain state machine.

No torch, no clock, no thread: whoever drives it (a live link or a virtual one) holds the lock.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, ModelShape, Table, call_hook, check_table, refused


class Slot(NamedTuple):
    """Room for one expert on a device."""

    device: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody calls


NOBODY = -1
NO_SLOT = -2


class ExpertCache:
    """Slots of all devices; the expert of flat index n lives on device n mod devices.

    The bytes in use are `occupied` slots times the bytes of one expert, loading ones included.
    Experts are named by their flat indices.
    """

    def __init__(
        self,
        shape: ModelShape,
        slots: Sequence[int],
        keys: Callable[[ExpertId, bool], Table],
        on_evict: Callable[[ExpertId], None] | None = None,
        displaces_less: bool = False,
    ) -> None:
        """A hook that raises, keys of another type, NaN where a key decides are a PolicyError.

        `displaces_less` is the policy's, see `Placement`.
        """
        self.shape = shape
        self.slots = tuple(slots)
        self.occupied = 0
        self.peak_occupied = 0
        self.absent = bytearray(b"\1") * shape.size  # whether an expert has no slot; only read it
        self.protected: NDArray[np.bool_] = np.zeros(shape.size, dtype=bool)
        """Who leaves for no prefetch, and for an on-demand load only if nobody else can."""
        self._devices = devices = len(slots)
        self._keys = keys
        self._on_evict = on_evict
        self._displaces_less = displaces_less
        self.experts = [ExpertId(*divmod(n, shape.experts)) for n in range(shape.size)]
        self._slot: list[Slot | None] = [None] * shape.size
        self._pins = [0] * shape.size
        self._resident = bytearray(shape.size)
        self._evictable = bytearray(shape.size)
        evictable = np.frombuffer(self._evictable, dtype=bool)
        self._evictable_of = [evictable[device::devices] for device in range(devices)]
        self._protected_of = [self.protected[device::devices] for device in range(devices)]
        self._free = [[Slot(n, i) for i in reversed(range(count))] for n, count in enumerate(slots)]
        self._checked: object = None
        self._keys_of: list[NDArray[np.float64]] = []

    def device_of(self, flat: int) -> int:
        return flat % self._devices

    def is_resident(self, flat: int) -> bool:
        return bool(self._resident[flat])

    def slot(self, flat: int) -> Slot:
        """Return the slot of a loading or resident expert; ValueError if it is absent."""
        slot = self._slot[flat]
        if slot is None:
            raise ValueError(f"{self.experts[flat]} has no slot")
        return slot

    def reserve(self, flat: int, urgent: bool) -> int:
        """Take a slot, evicting if none is free; return who had to leave, NOBODY, or NO_SLOT."""
        if not self.absent[flat]:
            raise ValueError(f"{self.experts[flat]} already has a slot")
        free = self._free[flat % self._devices]
        victim = NOBODY
        if free:
            slot = free.pop()
        else:
            victim = self._victim(flat, urgent)
            if victim == NOBODY:
                return NO_SLOT
            slot = self._remove(victim)
            if self._on_evict is not None:
                expert = self.experts[victim]
                call_hook(self._on_evict, expert.layer, expert)
        self._slot[flat] = slot
        self.absent[flat] = False
        self.occupied += 1
        if self.occupied > self.peak_occupied:
            self.peak_occupied = self.occupied
        return victim

    def loaded(self, flat: int) -> None:
        if self.absent[flat] or self._resident[flat]:
            raise ValueError(f"{self.experts[flat]} is not loading")
        self._resident[flat] = True
        self._evictable[flat] = not self._pins[flat]

    def abandon(self, flat: int) -> None:
        slot = self._remove(flat)
        self._free[slot.device].append(slot)

    def pin(self, flat: int) -> None:
        """Keep an expert from eviction until it is unpinned as often; it may still be absent."""
        self._pins[flat] += 1
        self._evictable[flat] = False

    def is_pinned(self, flat: int) -> bool:
        return self._pins[flat] > 0

    def unpin(self, flat: int) -> None:
        """Take one pin back; ValueError if there is none."""
        if not self._pins[flat]:
            raise ValueError(f"{self.experts[flat]} is not pinned")
        self._pins[flat] -= 1
        self._evictable[flat] = self._resident[flat] and not self._pins[flat]

    def check_integrity(self) -> None:
        """Raise AssertionError if slots, states and pins contradict each other."""
        placed = {flat: slot for flat, slot in enumerate(self._slot) if slot}
        taken = set(placed.values())
        assert len(taken) == len(placed) == self.occupied, "two experts share a slot"
        for device, count in enumerate(self.slots):
            ours = {slot for slot in taken if slot.device == device}
            assert ours.isdisjoint(self._free[device]), "a taken slot is free"
            assert len(ours) + len(self._free[device]) == count, "slots were lost"
        for flat, slot in placed.items():
            assert slot.device == self.device_of(flat), "an expert is on a foreign device"
        for flat in range(self.shape.size):
            assert self.absent[flat] == (flat not in placed), "an absent expert has a slot"
            assert not (self._resident[flat] and self.absent[flat]), "a resident has no slot"
            evictable = bool(self._resident[flat]) and not self._pins[flat]
            assert self._evictable[flat] == evictable, "pins and evictability disagree"

    def _victim(self, flat: int, urgent: bool) -> int:
        """Return whom the load of an expert may evict, or NOBODY; of equal keys the first."""
        incoming = self.experts[flat]
        given = call_hook(self._keys, incoming.layer, incoming, urgent)
        if given is not self._checked:
            self._take_keys(given, incoming)
        device = flat % self._devices
        evictable = (self._evictable_of[device] > self._protected_of[device]).nonzero()[0]
        if urgent and not len(evictable):
            evictable = self._evictable_of[device].nonzero()[0]
        if not len(evictable):
            return NOBODY
        all_keys = self._keys_of[device]
        keys = all_keys[evictable]
        # NaN is the largest to argmax.
        best = keys.argmax()
        key = keys.item(best)
        if math.isnan(key):
            raise refused(self._keys, incoming.layer, "answered keys that hold NaN for a resident")
        if not urgent:
            own = all_keys.item(flat // self._devices) if self._displaces_less else -math.inf
            if not key > own:
                return NOBODY
        return device + evictable.item(best) * self._devices

    def _take_keys(self, keys: Table, incoming: ExpertId) -> None:
        check_table(self._keys, incoming.layer, keys, (self.shape.layers, self.shape.experts))
        if not keys.flags.c_contiguous:
            raise refused(self._keys, incoming.layer, "answered an array that is not in C order")
        flat, devices = keys.reshape(-1), self._devices
        self._checked, self._keys_of = keys, [flat[device::devices] for device in range(devices)]

    def _remove(self, flat: int) -> Slot:
        slot = self.slot(flat)
        self._slot[flat] = None
        self._resident[flat] = self._evictable[flat] = False
        self.absent[flat] = True
        self.occupied -= 1
        return slot
