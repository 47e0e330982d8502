"""Eviction orders that need no prediction, and a policy base that wires up the per-layer one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Policy


class UsageTable:
    """When and how often each expert was used; a load counts as a use for recency only."""

    def __init__(self, shape: ModelShape) -> None:
        self._time = 0
        self.last_used = np.zeros((shape.layers, shape.experts))
        self.visits = np.zeros((shape.layers, shape.experts))

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._time += 1
        last_used, visits = self.last_used[outcome.layer], self.visits[outcome.layer]
        # One by one: for the few experts of a decode step this beats indexing with a list.
        for used in (outcome.hits, outcome.late, outcome.misses):
            for index in used:
                last_used[index] = self._time
                visits[index] += 1

    def on_load(self, expert: ExpertId) -> None:
        self._time += 1
        self.last_used[expert] = self._time

    def lru_keys(self) -> NDArray[np.float64]:
        return -self.last_used

    def lfu_keys(self) -> NDArray[np.float64]:
        """Fewest visits first; equal counts fall back to recency."""
        return -(self.visits + self.last_used / (self._time + 1))


class LayeredUsage(UsageTable):
    """A usage table for caches of equal size: counts the residents of every layer.

    What was prefetched stays until its layer's next gate, unless an on-demand load needs the slot:
    else one prefetch would undo another.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.residents = np.zeros(shape.layers)
        self._ahead = np.zeros((shape.layers, shape.experts), dtype=bool)
        self._demanded = np.zeros((shape.layers, shape.experts), dtype=bool)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        self._ahead[outcome.layer] = False
        demanded = self._demanded[outcome.layer]
        demanded[:] = False
        for index in (*outcome.late, *outcome.misses):
            demanded[index] = True

    def on_load(self, expert: ExpertId) -> None:
        super().on_load(expert)
        self.residents[expert.layer] += 1
        self._ahead[expert] = not self._demanded[expert]
        self._demanded[expert] = False

    def on_evict(self, expert: ExpertId) -> None:
        self.residents[expert.layer] -= 1
        self._ahead[expert] = False

    def layered_lru_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        """Least recently used of the layer with most residents; ties: of `incoming`'s own layer.

        This keeps the layers' shares equal within one, whatever the number of slots.
        """
        rank = 2 * self.residents
        rank[incoming.layer] += 1
        # The age is below 1, so it orders experts inside a layer only.
        keys: NDArray[np.float64] = rank[:, None] - self.last_used / (self._time + 1)
        keys[self._ahead] = -np.inf
        return keys


class LayeredLruPolicy(Policy):
    """No prediction; every layer has a cache of equal size, which evicts its least recently used.

    `usage` starts anew with the cache.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.usage = LayeredUsage(shape)

    def begin_serving(self) -> None:
        self.usage = LayeredUsage(self.shape)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self.usage.on_outcome(outcome)

    def on_load(self, expert: ExpertId) -> None:
        self.usage.on_load(expert)

    def on_evict(self, expert: ExpertId) -> None:
        self.usage.on_evict(expert)

    def eviction_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        return self.usage.layered_lru_keys(incoming)
