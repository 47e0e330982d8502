"""FineMoE's eviction priority: what is expected least and was used least goes (section 4.5)."""

import numpy as np

from finemoe.offload.policy import ExpertId, FloatArray, LayerOutcome, ModelShape, Table

SMALLEST_PROBABILITY = 1e-9


class ExpectedUse:
    """Keys 1 / (p * freq): p from the maps searched last, freq counts visits of the cache.

    An expert not yet visited counts as visited once. `expect` may be called from another thread
    than the others: it writes p alone, and tells by `_revised` from which layers on.
    """

    def __init__(self, shape: ModelShape) -> None:
        table = (shape.layers, shape.experts)
        self._layers = shape.layers
        self._anything = np.float32(1 / shape.experts)
        self._expected = np.full(table, self._anything, dtype=np.float64)
        self._visits = [[0] * shape.experts for _ in range(shape.layers)]
        self._frequency = np.ones(table)
        self._keys = np.empty(table)
        self._revised = [0]

    def expect(self, probabilities: FloatArray, first: int) -> None:
        """Take p of the layers from `first` on, shape (L - first, J)."""
        np.maximum(probabilities, SMALLEST_PROBABILITY, out=self._expected[first:])
        self._revised.append(first)

    def expect_anything(self) -> None:
        """Take every expert of a layer to be as likely as any."""
        self._expected[:] = self._anything
        self._revised.append(0)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        layer = outcome.layer
        visits, frequency = self._visits[layer], self._frequency[layer]
        expected, keys = self._expected[layer], self._keys[layer]
        # One by one: for the few experts of a decode step this beats indexing with a list.
        for index in outcome.activated:
            visits[index] += 1
            frequency[index] = visits[index]
            keys[index] = 1 / (expected[index] * frequency[index])

    def keys(self) -> Table:
        """Return the keys in an array that is updated in place."""
        first = self._layers
        while self._revised:
            first = min(first, self._revised.pop())
        if first < self._layers:
            keys = self._keys[first:]
            np.multiply(self._expected[first:], self._frequency[first:], out=keys)
            np.reciprocal(keys, out=keys)
        return self._keys


class WholeUse(ExpectedUse):
    """The demo's keys: p * freq as an integer; the least goes, of equal ones the first."""

    def forget(self, expert: ExpertId) -> None:
        self._visits[expert.layer][expert.index] = 0
        self._frequency[expert] = 1

    def keys(self) -> Table:
        return -np.floor(self._expected * self._frequency)
