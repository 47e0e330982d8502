"""Eviction orders that need no prediction, and a policy base for the per-layer one.

Orders are kept up to date, an expert or a row at a time, so that asking for one costs nothing.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Policy

TICK = 2.0**-36
"""What a use or a load adds to the time: sums with counts below 2**17 are exact."""
NO_LAYER = -1


class Recency:
    """When each expert was last used; a load counts as a use. A policy may hold or extend it.

    One layer may be protected: its keys are -inf, while its uses and loads are noted aside.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.forget()

    def forget(self) -> None:
        """Start anew, as the cache does."""
        self._now = 0.0
        self._recency = np.zeros((self.shape.layers, self.shape.experts))
        self._aside = np.zeros(self.shape.experts)
        self._protected = NO_LAYER

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._now -= TICK
        row = self._row(outcome.layer)
        for used in (outcome.hits, outcome.late, outcome.misses):
            for index in used:
                row[index] = self._now

    def on_load(self, expert: ExpertId) -> None:
        self._now -= TICK
        self._row(expert.layer)[expert.index] = self._now

    def lru_keys(self) -> NDArray[np.float64]:
        """Return the negative time of each expert's last use, in (-1, 0]; the table's own array."""
        return self._recency

    def protect(self, layer: int) -> None:
        """Keep a layer's experts from eviction, and those of the layer before no longer."""
        if layer == self._protected:
            return
        if self._protected != NO_LAYER:
            self._recency[self._protected] = self._aside
        self._aside[:] = self._recency[layer]
        self._recency[layer] = -math.inf
        self._protected = layer

    def _row(self, layer: int) -> NDArray[np.float64]:
        return self._aside if layer == self._protected else self._recency[layer]


class UsageTable(Recency):
    """When and how often each expert was used; a load counts as a use for recency only."""

    def forget(self) -> None:
        super().forget()
        self.visits = np.zeros((self.shape.layers, self.shape.experts))

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        visits = self.visits[outcome.layer]
        for used in (outcome.hits, outcome.late, outcome.misses):
            for index in used:
                visits[index] += 1

    def lfu_keys(self) -> NDArray[np.float64]:
        """Fewest visits first; equal counts fall back to recency."""
        return self._recency - self.visits


class LayeredLruPolicy(Recency, Policy):
    """No prediction; every layer has a cache of equal size, which evicts its least recently used.

    What was prefetched stays until its layer's next gate, unless an on-demand load needs the slot:
    else one prefetch would undo another.
    """

    def forget(self) -> None:
        super().forget()
        self._order = np.zeros((self.shape.layers, self.shape.experts))
        """The last uses, and -inf for what was prefetched."""
        self._ranks = np.zeros((self.shape.layers, 1))
        """Twice the residents of each layer; the last uses, above -1, order experts inside."""
        self._keys = np.zeros((self.shape.layers, self.shape.experts))
        self._demanded: list[set[int]] = [set() for _ in range(self.shape.layers)]

    def begin_serving(self) -> None:
        self.forget()

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        layer = outcome.layer
        self._demanded[layer] = {*outcome.late, *outcome.misses}
        self._order[layer] = self._recency[layer]

    def on_load(self, expert: ExpertId) -> None:
        super().on_load(expert)
        layer, index = expert
        self._ranks[layer] += 2.0
        demanded = index in self._demanded[layer]
        self._demanded[layer].discard(index)
        self._order[expert] = self._now if demanded else -math.inf

    def on_evict(self, expert: ExpertId) -> None:
        self._ranks[expert.layer] -= 2.0

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> NDArray[np.float64]:
        """Least recently used of the layer with most residents; ties: of `incoming`'s own layer.

        This keeps the layers' shares equal within one, whatever the number of slots. Keys hold for
        residents.
        """
        np.add(self._order, self._ranks, out=self._keys)
        self._keys[incoming.layer] += 1.0
        return self._keys
