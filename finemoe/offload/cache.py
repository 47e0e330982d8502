"""The expert cache: which expert is in which slot of which device, as a plain state machine.

No torch, no clock, no thread: whoever drives it (a live link or a virtual one) holds the lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, ModelShape


class State(Enum):
    """Whether an expert is on its device, on its way, or neither."""

    ABSENT = auto()
    LOADING = auto()
    RESIDENT = auto()


class Slot(NamedTuple):
    """Room for one expert on a device."""

    device: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody calls


EvictionKeys = Callable[[ExpertId], NDArray[np.float64]]
EvictionFloor = Callable[[ExpertId], float]
EvictionListener = Callable[[ExpertId], None]


class Reservation(NamedTuple):
    """A slot taken for a load, and the resident that had to leave it."""

    slot: Slot
    evicted: ExpertId | None


class ExpertCache:
    """Slots of all devices; expert (l, j) lives on device (l * J + j) mod devices.

    The bytes in use are `occupied` slots times the bytes of one expert, loading ones included.
    """

    def __init__(
        self,
        shape: ModelShape,
        slots: Sequence[int],
        keys: EvictionKeys,
        evicted: EvictionListener = lambda expert: None,
        floor: EvictionFloor = lambda expert: -math.inf,
    ) -> None:
        self.shape = shape
        self.slots = tuple(slots)
        self.peak_occupied = 0
        self._keys = keys
        self._evicted = evicted
        self._floor = floor
        self._slot: dict[ExpertId, Slot] = {}
        self._pins: dict[ExpertId, int] = {}
        self._free = [
            [Slot(device, index) for index in reversed(range(count))]
            for device, count in enumerate(slots)
        ]
        self.residents: set[ExpertId] = set()
        """Experts that are whole on their device; for reading only."""
        experts = shape.all_experts()
        self._experts_on = [experts[device :: len(slots)] for device in range(len(slots))]
        self._absent = np.ones((shape.layers, shape.experts), dtype=bool)
        self._evictable = np.zeros((shape.layers, shape.experts), dtype=bool)
        self._evictable_on = [self.share(self._evictable, device) for device in range(len(slots))]

    def device_of(self, expert: ExpertId) -> int:
        return (expert[0] * self.shape.experts + expert[1]) % len(self.slots)

    def share(self, per_expert: NDArray[Any], device: int) -> NDArray[Any]:
        """Return a view of what an array (L, J) holds for the experts of one device, flat."""
        flat = per_expert.reshape(-1)
        return flat if len(self.slots) == 1 else flat[device :: len(self.slots)]

    def absent_on(self, device: int) -> NDArray[np.bool_]:
        """Return a view that tells of each of a device's experts whether it has no slot."""
        return self.share(self._absent, device)

    def is_absent(self, expert: ExpertId) -> bool:
        return expert not in self._slot

    def state(self, expert: ExpertId) -> State:
        if expert in self.residents:
            return State.RESIDENT
        return State.LOADING if expert in self._slot else State.ABSENT

    def slot(self, expert: ExpertId) -> Slot:
        """Return the slot of a loading or resident expert; KeyError if it is absent."""
        return self._slot[expert]

    @property
    def occupied(self) -> int:
        return len(self._slot)

    def has_room(self, expert: ExpertId) -> bool:
        """Tell whether the expert's device has a free slot."""
        return bool(self._free[self.device_of(expert)])

    def reserve(self, expert: ExpertId, urgent: bool) -> Reservation | None:
        """Take a slot for an absent expert, evicting if none is free; None if none can be had."""
        if expert in self._slot:
            raise ValueError(f"{expert} already has a slot")
        device = self.device_of(expert)
        evicted = None
        if not self._free[device]:
            evicted = self._victim(expert, device, urgent)
            if evicted is None:
                return None
            self._remove(evicted)
            self._evicted(evicted)
        slot = self._free[device].pop()
        self._slot[expert] = slot
        self._absent[expert] = False
        if len(self._slot) > self.peak_occupied:
            self.peak_occupied = len(self._slot)
        return Reservation(slot, evicted)

    def loaded(self, expert: ExpertId) -> None:
        """Turn a loading expert into a resident one."""
        if expert in self.residents or expert not in self._slot:
            raise ValueError(f"{expert} is not loading")
        self.residents.add(expert)
        self._evictable[expert] = expert not in self._pins

    def abandon(self, expert: ExpertId) -> None:
        """Give back the slot of a loading expert."""
        if self.state(expert) is not State.LOADING:
            raise ValueError(f"{expert} is not loading")
        self._remove(expert)

    def pin(self, expert: ExpertId) -> None:
        """Keep an expert from eviction until it is unpinned as often; it may still be absent."""
        self._pins[expert] = self._pins.get(expert, 0) + 1
        self._evictable[expert] = False

    def is_pinned(self, expert: ExpertId) -> bool:
        return expert in self._pins

    def unpin(self, expert: ExpertId) -> None:
        self._pins[expert] -= 1
        if not self._pins[expert]:
            del self._pins[expert]
            self._evictable[expert] = expert in self.residents

    def check_integrity(self) -> None:
        """Raise AssertionError if slots, states and pins contradict each other."""
        taken = list(self._slot.values())
        assert len(set(taken)) == len(taken), "two experts share a slot"
        for device, count in enumerate(self.slots):
            held = {slot for slot in taken if slot.device == device}
            assert held.isdisjoint(self._free[device]), "a taken slot is free"
            assert len(held) + len(self._free[device]) == count, "slots were lost"
        for expert, slot in self._slot.items():
            assert slot.device == self.device_of(expert), "an expert is on a foreign device"
        assert self.residents <= self._slot.keys(), "a resident has no slot"
        absent = {ExpertId(*map(int, place)) for place in np.argwhere(self._absent)}
        assert absent.isdisjoint(self._slot), "an absent expert has a slot"
        assert len(absent) + len(self._slot) == self._absent.size, "an expert is nowhere"
        evictable = {ExpertId(*map(int, place)) for place in np.argwhere(self._evictable)}
        assert evictable == self.residents - self._pins.keys(), "pins and evictability disagree"

    def _victim(self, incoming: ExpertId, device: int, urgent: bool) -> ExpertId | None:
        candidates = self._evictable_on[device].nonzero()[0]
        if not candidates.size:
            return None
        keys = self.share(self._keys(incoming), device)[candidates]
        best = int(keys.argmax())
        if not urgent and keys[best] <= self._floor(incoming):
            return None
        return self._experts_on[device][candidates[best]]

    def _remove(self, expert: ExpertId) -> None:
        slot = self._slot.pop(expert)
        self._free[slot.device].append(slot)
        self.residents.discard(expert)
        self._absent[expert] = True
        self._evictable[expert] = False
