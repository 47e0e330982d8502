"""Eviction orders that need no prediction: policies that never prefetch, and bases of others."""

import numpy as np

from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Policy, Table

TICK = 2.0**-36  # what a use or a load adds to the time: sums with counts below 2**17 are exact


class Recency(Policy):
    """Least recently used first out; a load counts as a use."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.forget()

    def begin_serving(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew, as the cache does."""
        self._now = 0.0
        self._recency = np.zeros((self.shape.layers, self.shape.experts))

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._now -= TICK
        row = self._recency[outcome.layer]
        for index in outcome.activated:
            row[index] = self._now

    def on_load(self, expert: ExpertId) -> None:
        self._now -= TICK
        self._recency[expert] = self._now

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Return the negative time of each expert's last use, in (-1, 0]."""
        return self._recency


class UsageTable(Recency):
    """Least frequently used first out, of equal counts the least recently; loads do not count."""

    def forget(self) -> None:
        super().forget()
        self.visits = np.zeros((self.shape.layers, self.shape.experts))
        self._keys = np.zeros(self.visits.shape)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        visits = self.visits[outcome.layer]
        for index in outcome.activated:
            visits[index] += 1

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return np.subtract(self._recency, self.visits, out=self._keys)


class LayeredLruPolicy(Recency):
    """No prediction; layers have caches of equal size, which evict their least recently used."""

    def forget(self) -> None:
        super().forget()
        self._ranks = [0.0] * self.shape.layers
        self._layered = np.zeros((self.shape.layers, self.shape.experts))
        """Each layer's rank, and on top the last uses, above -1, which order experts inside."""
        self._incoming = 0
        self._raise(0, 1.0)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        row, key = self._layered[outcome.layer], self._now + self._ranks[outcome.layer]
        for index in outcome.activated:
            row[index] = key

    def on_load(self, expert: ExpertId) -> None:
        super().on_load(expert)
        self._raise(expert.layer, 2.0)
        self._layered[expert] = self._now + self._ranks[expert.layer]

    def on_evict(self, expert: ExpertId) -> None:
        self._raise(expert.layer, -2.0)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Least recently used of the layer with most residents; ties: of `incoming`'s own layer.

        This keeps the layers' shares equal within one. Keys hold for residents.
        """
        if incoming.layer != self._incoming:
            self._raise(self._incoming, -1.0)
            self._incoming = incoming.layer
            self._raise(self._incoming, 1.0)
        return self._layered

    def _raise(self, layer: int, by: float) -> None:
        self._ranks[layer] += by
        self._layered[layer] += by
