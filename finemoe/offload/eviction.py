"""Eviction orders that need no prediction: least recently and least frequently used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape


class UsageTable:
    """When and how often each expert was used; a load counts as a use for recency only."""

    def __init__(self, shape: ModelShape) -> None:
        self._time = 0
        self.last_used = np.zeros((shape.layers, shape.experts))
        self.visits = np.zeros((shape.layers, shape.experts))

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._time += 1
        used = list(outcome.activated)
        self.last_used[outcome.layer, used] = self._time
        self.visits[outcome.layer, used] += 1

    def on_load(self, expert: ExpertId) -> None:
        self._time += 1
        self.last_used[expert] = self._time

    def lru_keys(self) -> NDArray[np.float64]:
        return -self.last_used

    def lfu_keys(self) -> NDArray[np.float64]:
        """Fewest visits first; equal counts fall back to recency."""
        return -(self.visits + self.last_used / (self._time + 1))
