"""What one link is wished to prefetch: a priority for every expert that lives behind it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, ModelShape

NONE = float("-inf")
"""The priority of an expert that nobody wishes for."""
NOWHERE = -1
"""Where the best wish is if there is none."""
STALE = -2
"""Where the best wish is if it has to be looked up."""


class WishList:
    """Priorities of the experts (l, j) with (l * J + j) mod devices == device.

    The best wish has the highest priority; of equal ones the first layer's, and there the first
    expert's.
    """

    def __init__(self, shape: ModelShape, devices: int, device: int) -> None:
        self._per_layer = shape.experts
        self._devices = devices
        self._device = device
        self._experts = shape.all_experts()[device::devices]
        self._priorities = np.full(len(self._experts), NONE)
        self._best = NOWHERE
        self._highest = NONE

    def best(self) -> tuple[ExpertId, float] | None:
        """Return the expert to prefetch first and its priority, or None."""
        if self._best == STALE:
            self._look_up()
        return None if self._best == NOWHERE else (self._experts[self._best], self._highest)

    def any(self) -> bool:
        """Tell whether there is a wish."""
        if self._best == STALE:
            self._look_up()
        return self._best != NOWHERE

    def position(self, expert: ExpertId) -> int:
        """Return where arrays (experts of this link,) hold an expert."""
        return (expert[0] * self._per_layer + expert[1]) // self._devices

    def wished(self, expert: ExpertId) -> bool:
        return bool(self._priorities[self.position(expert)] > NONE)

    def put(self, expert: ExpertId, priority: float) -> None:
        """Wish for an expert, or give a wish its new priority."""
        position = self.position(expert)
        self._priorities[position] = priority
        best = self._best
        if best == STALE:
            return
        if priority > self._highest or (priority == self._highest and position < best):
            self._best, self._highest = position, priority
        elif position == best and priority < self._highest:
            self._best = STALE

    def put_all(self, priorities: NDArray[np.float64], where: NDArray[np.bool_]) -> None:
        """Wish for many at once; both of the shape (experts of this link,)."""
        np.copyto(self._priorities, priorities, where=where)
        self._best = STALE

    def drop(self, expert: ExpertId) -> None:
        """Forget the wish for an expert, if there is one."""
        position = self.position(expert)
        self._priorities[position] = NONE
        if position == self._best:
            self._best = STALE

    def drop_layer(self, layer: int) -> None:
        """Forget all wishes for a layer."""
        if self._best == NOWHERE:
            return
        start = -(-(layer * self._per_layer - self._device) // self._devices)
        stop = -(-((layer + 1) * self._per_layer - self._device) // self._devices)
        self._priorities[start:stop] = NONE
        if start <= self._best < stop:
            self._best = STALE

    def _look_up(self) -> None:
        position = int(self._priorities.argmax())
        self._highest = float(self._priorities[position])
        self._best = position if self._highest > NONE else NOWHERE
