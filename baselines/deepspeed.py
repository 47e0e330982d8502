"""DeepSpeed-Inference as the FineMoE paper runs it (section 6.1): whole layers, whoever is chosen.

All J experts of the next layer are fetched while one runs, and a layer starts when they are there,
so nothing is missed where a layer fits the slots; where it does not, the rest is loaded on demand.
The expert cache, least recently used first out, was added by that paper for fairness.
"""

import math

import numpy as np

from baselines.on_demand import OnDemandPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    ModelShape,
    Placement,
    Priorities,
    Table,
)


class DeepSpeedPolicy(OnDemandPolicy):
    """Fetches layer after layer, one ahead of the model, and waits for each."""

    placement = Placement("critical_path", awaited=True)

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self._keys = np.empty((shape.layers, shape.experts))
        self._layers = np.eye(shape.layers)[:, :, None].repeat(shape.experts, axis=2)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        return self._layers[0]

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        return self._layers[gate.layer + 1] if gate.layer + 1 < self.shape.layers else None

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Least recently used; a layer that is being fetched does not push itself out."""
        np.copyto(self._keys, self._recency)
        self._keys[incoming.layer] = -math.inf
        return self._keys
