"""What Mixtral-Offloading and ProMoE share: the input of one layer's gate tells of a later layer.

Every layer has a cache of equal size, least recently used first out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.eviction import LayeredLruPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    GateWeights,
    Iteration,
    ModelShape,
    Prefetch,
)
from finemoe.offload.routed import softmax

Ranking = list[tuple[int, float]]
"""Experts of one layer and their probabilities, best first."""


def likeliest(scores: FloatArray, count: int) -> list[Ranking]:
    """Return, for each layer, the union of its tokens' `count` best experts.

    `scores` are logits, shape (layers, T, J); an expert's probability is the largest softmax among
    the tokens that it was chosen for. Equal scores: the lower index.
    """
    probabilities = softmax(scores)
    chosen = (-scores).argsort(axis=-1, kind="stable")[..., :count]
    if scores.shape[1] > 1:
        return _united(probabilities, chosen)
    indices = chosen[:, 0]
    best = probabilities[np.arange(len(indices))[:, None], 0, indices]
    layers = zip(indices.tolist(), best.tolist(), strict=True)
    return [list(zip(*ranking, strict=True)) for ranking in layers]


def _united(probabilities: FloatArray, chosen: NDArray[np.intp]) -> list[Ranking]:
    """Return rankings over all tokens, (layers, T, J), of what each chose, (layers, T, count)."""
    kept = np.full_like(probabilities, -1)
    best = np.take_along_axis(probabilities, chosen, axis=-1)
    np.put_along_axis(kept, chosen, best, axis=-1)
    largest = kept.max(axis=1)
    order = (-largest).argsort(axis=-1, kind="stable").tolist()
    layers = zip(order, largest.tolist(), strict=True)
    return [[(j, row[j]) for j in indices if row[j] >= 0] for indices, row in layers]


class SpeculatingPolicy(LayeredLruPolicy):
    """After the gate of layer l asks for each token's `count` best experts of layer l + distance.

    The later layer's own gate scores them, unless a subclass has something better.
    """

    def __init__(self, shape: ModelShape, distance: int, count: int) -> None:
        super().__init__(shape)
        self._distance = distance
        self._count = count
        self._sources = max(shape.layers - distance, 0)
        self._experts = [
            [ExpertId(layer, index) for index in range(shape.experts)]
            for layer in range(shape.layers)
        ]
        self._gates: GateWeights | None = None
        self._ahead: list[list[Prefetch]] = []

    def set_gates(self, gates: GateWeights) -> None:
        self._gates = gates

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Sequence[Prefetch]:
        self._ahead = []
        return ()

    def compute_ahead(self, iteration: Iteration, gates: Gates) -> None:
        assert gates.hidden_states is not None
        self._ahead = self._guess(0, gates.hidden_states[: self._sources])

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        if gate.layer >= self._sources:
            return ()
        if self._ahead:
            return self._ahead[gate.layer]
        assert gate.hidden_states is not None
        return self._guess(gate.layer, gate.hidden_states[None])[0]

    def _guess(self, first: int, hidden_states: FloatArray) -> list[list[Prefetch]]:
        """Return what is asked for after each gate from layer `first` on, for inputs (S, T, h)."""
        rankings = likeliest(self._logits(first, hidden_states), self._count)
        return [
            self._prefetches(target, ranking)
            for target, ranking in enumerate(rankings, first + self._distance)
        ]

    def _logits(self, first: int, hidden_states: FloatArray) -> FloatArray:
        """Return what the later gates make of inputs (S, T, h) of gates `first` on, (S, T, J)."""
        assert self._gates is not None
        weight, bias = self._gates.weight, self._gates.bias
        targets = slice(first + self._distance, first + self._distance + len(hidden_states))
        logits: FloatArray = np.matmul(hidden_states, weight[targets].swapaxes(1, 2))
        return logits if bias is None else logits + bias[targets, None]

    def _prefetches(self, target: int, ranking: Ranking) -> list[Prefetch]:
        """Return wishes for experts of a layer by their probability."""
        experts = self._experts[target]
        return [Prefetch(experts[index], probability) for index, probability in ranking]
