"""Mixtral-Offloading (arXiv 2312.17238): the next layer's gate guesses from this layer's input.

Speculation and cache are those of its paper; its quantisation is left out, so results stay
lossless, and so are the staging buffers of its code, whose place the engine's slots take. The
cache follows src/expert_cache.py of dvmazur/mixtral-offloading: each layer is an eviction group of
its own with as many experts on the device as any other (src/build_model.py), least recently used
first out. As the FineMoE paper runs it (section 6.1), prefetches are synchronous.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finemoe.offload.eviction import LayeredLruPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    GateWeights,
    Iteration,
    ModelShape,
    Placement,
    Prefetch,
)
from finemoe.offload.routed import softmax

DISTANCE = 1
"""Layers that the guess looks ahead (section 6.1 of the FineMoE paper)."""


def likeliest(scores: FloatArray, count: int, layer: int) -> list[Prefetch]:
    """Return the union of each token's `count` best experts of `layer`, best first.

    `scores` are logits, shape (T, J); an expert's priority is the largest softmax probability
    among the tokens that it was chosen for. Equal scores: the lower index.
    """
    probabilities = softmax(scores)
    chosen = (-scores).argsort(axis=1, kind="stable")[:, :count]
    if len(scores) == 1:
        indices = chosen[0]
        best = probabilities[0, indices]
    else:
        kept = np.zeros_like(probabilities)
        np.put_along_axis(kept, chosen, np.take_along_axis(probabilities, chosen, 1), 1)
        indices = np.unique(chosen)
        best = kept.max(axis=0)[indices]
        order = (-best).argsort(kind="stable")
        indices, best = indices[order], best[order]
    pairs = zip(indices.tolist(), best.tolist(), strict=True)
    return [Prefetch(ExpertId(layer, index), priority) for index, priority in pairs]


class MixtralOffloadPolicy(LayeredLruPolicy):
    """After each gate waits for the top-K that the next gate would choose for the same input."""

    placement = Placement("critical_path", hidden_states=True, awaited=True, learns=False)

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self._gates: GateWeights | None = None

    def set_gates(self, gates: GateWeights) -> None:
        self._gates = gates

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        target = gate.layer + DISTANCE
        if target >= self.shape.layers:
            return ()
        assert self._gates is not None
        assert gate.hidden_states is not None
        logits = self._gates.logits(target, gate.hidden_states)
        return likeliest(logits, self.shape.top_k, target)
