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
    LayerOutcome,
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
        self._layers = np.eye(shape.layers)[:, :, None].repeat(shape.experts, axis=2)

    def forget(self) -> None:
        super().forget()
        self._keys = np.empty((self.shape.layers, self.shape.experts))
        self._fetched = -1
        """The layer that the keys hold for, if nothing was used or loaded since but its experts."""

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        self._fetched = -1

    def on_load(self, expert: ExpertId) -> None:
        super().on_load(expert)
        if expert.layer != self._fetched:
            self._fetched = -1

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        return self._layers[0]

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        return self._layers[gate.layer + 1] if gate.layer + 1 < self.shape.layers else None

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Least recently used; a layer that is being fetched does not push itself out."""
        if incoming.layer != self._fetched:
            self._fetched = incoming.layer
            np.copyto(self._keys, self._recency)
            self._keys[self._fetched] = -math.inf
        return self._keys
