"""What one link is wished to prefetch: a priority for every expert that lives behind it."""

from __future__ import annotations

import math

import cython
import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ModelShape
from finemoe.offload.scans import largest

NONE = -math.inf
"""The priority of an expert that nobody wishes for."""
NOWHERE = -1
"""Where the best wish is if there is none."""
STALE = -2
"""Where the best wish is if it has to be looked up."""


class WishList:
    """Priorities of the experts whose places (l * J + j) mod devices == device.

    The best wish has the highest priority; of equal ones the first in place.
    """

    def __init__(self, shape: ModelShape, devices: int, device: int) -> None:
        self.highest = NONE
        """The priority of the best wish, after `best` was called."""
        self._per_layer = shape.experts
        self._devices = devices
        self._device = device
        self._priorities = np.full(len(range(device, shape.size, devices)), NONE)
        self._best = NOWHERE
        self._search_from = 0
        """While the best wish is stale: no wish before this position is as high as `highest`."""

    def best(self) -> int:
        """Return the place of the expert to prefetch first, or -1."""
        if self._best == STALE:
            self._look_up()
        return NOWHERE if self._best < 0 else self._device + self._best * self._devices

    def wished(self, place: int) -> bool:
        return bool(self._priorities[place // self._devices] > NONE)

    def put(self, place: int, priority: float) -> None:
        """Wish for an expert, or give a wish its new priority."""
        position = place // self._devices
        self._priorities[position] = priority
        best = self._best
        known = self._search_from if best == STALE else best
        if priority > self.highest or (priority == self.highest and position < known):
            self.highest = priority
            if best == STALE:
                self._search_from = position
            else:
                self._best = position
        elif position == best and priority < self.highest:
            self._lose_best(position)

    def put_all(self, table: NDArray[np.float64], marks: bytearray, layer: int) -> bool:
        """Wish for every expert from `layer` on that is marked and has a priority above 0.

        Table and marks are flat, (L * J,). False if a priority is NaN or infinite; then this list
        is of no use any more.
        """
        self._lose_best(0)
        self.highest = -NONE
        start = self._first_from(layer)
        if cython.compiled:
            place = self._device + start * self._devices
            for position in range(start, len(self._priorities)):
                priority = table[place]
                if not priority <= 0:
                    if not priority < -NONE:
                        return False
                    if marks[place]:
                        self._priorities[position] = priority
                place += self._devices
            return True
        mine = slice(self._device + start * self._devices, None, self._devices)
        priorities = table[mine]
        wished = (priorities > 0) & np.frombuffer(marks, dtype=bool)[mine]
        np.copyto(self._priorities[start:], priorities, where=wished)
        return bool((priorities < -NONE).all())

    def drop(self, place: int) -> None:
        """Forget the wish for an expert, if there is one."""
        position = place // self._devices
        self._priorities[position] = NONE
        if position == self._best:
            self._lose_best(position)

    def drop_layer(self, layer: int) -> None:
        """Forget all wishes for a layer."""
        if self._best == NOWHERE:
            return
        start = self._first_from(layer)
        stop = self._first_from(layer + 1)
        self._priorities[start:stop] = NONE
        if start <= self._best < stop:
            self._lose_best(stop)

    def _first_from(self, layer: int) -> int:
        """Return the position of the first expert of a layer or a later one."""
        return (layer * self._per_layer - self._device + self._devices - 1) // self._devices

    def _lose_best(self, first: int) -> None:
        """Note that the best wish has to be looked up; see `_search_from`."""
        self._best, self._search_from = STALE, first

    def _look_up(self) -> None:
        """Find the best wish anew; `highest` has been an upper bound since it was lost."""
        priorities, first = self._priorities, self._search_from
        best = largest(priorities, first, len(priorities), self.highest)
        if best < 0 or priorities[best] < self.highest:
            before = largest(priorities, 0, first, self.highest)
            if before >= 0 and (best < 0 or priorities[before] >= priorities[best]):
                best = before
        self._best = best
        self.highest = NONE if best < 0 else float(priorities[best])
