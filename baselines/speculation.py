"""What Mixtral-Offloading and ProMoE share: the input of one layer's gate tells of a later layer.

Every layer has a cache of equal size, least recently used first out.
"""

import numpy as np

from finemoe.offload.eviction import LayeredLruPolicy
from finemoe.offload.policy import (
    SMALLEST_PRIORITY,
    FloatArray,
    Gate,
    Gates,
    GateWeights,
    Iteration,
    ModelShape,
    Priorities,
    Table,
    layer_requests,
)
from finemoe.offload.routed import softmax
from finemoe.selection import top_experts


def likeliest(scores: FloatArray, count: int) -> Table:
    """Return the probabilities of the union of each layer's tokens' `count` best experts, or 0.

    Takes logits (layers, T, J), returns (layers, J): the largest softmax among the tokens that an
    expert was chosen for. Equal scores: the lower index.
    """
    likely = np.maximum(softmax(scores).astype(np.float64), SMALLEST_PRIORITY)
    probabilities: Table = np.where(top_experts(scores, count), likely, 0.0).max(axis=1)
    return probabilities


class SpeculatingPolicy(LayeredLruPolicy):
    """After the gate of layer l asks for each token's `count` best experts of layer l + distance.

    The later layer's own gate scores them, unless a subclass has something better.
    """

    def __init__(self, shape: ModelShape, distance: int, count: int) -> None:
        super().__init__(shape)
        self._distance = distance
        self._count = count
        self._sources = max(shape.layers - distance, 0)
        self._gates: GateWeights | None = None
        self._ahead: list[Priorities] = []

    def set_gates(self, gates: GateWeights) -> None:
        self._gates = gates

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> None:
        self._ahead = []

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        assert gates.hidden_states is not None
        self._ahead = self._guess(0, gates.hidden_states[: self._sources])

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        if gate.layer >= self._sources:
            return None
        if self._ahead:
            return self._ahead[gate.layer]
        assert gate.hidden_states is not None
        return self._guess(gate.layer, gate.hidden_states[None])[0]

    def _guess(self, first: int, hidden_states: FloatArray) -> list[Priorities]:
        """Return what is asked for after each gate from layer `first` on, for inputs (S, T, h)."""
        probabilities = likeliest(self._logits(first, hidden_states), self._count)
        target = first + self._distance
        return layer_requests(self.shape, target, self._rank(target, probabilities))

    def _logits(self, first: int, hidden_states: FloatArray) -> FloatArray:
        """Return what the later gates make of inputs (S, T, h) of gates `first` on, (S, T, J)."""
        assert self._gates is not None
        target = first + self._distance
        return self._gates.logits(slice(target, target + len(hidden_states)), hidden_states)

    def _rank(self, first: int, probabilities: Table) -> Table:
        """Return the priorities of experts of layers `first` on with these probabilities."""
        return probabilities
