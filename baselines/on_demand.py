"""On demand: no prediction, no prefetch; the least recently used expert leaves the cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.eviction import UsageTable
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Policy


class OnDemandPolicy(Policy):
    """Loads an expert when its gate has chosen it."""

    def __init__(self, shape: ModelShape) -> None:
        self._usage = UsageTable(shape)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._usage.on_outcome(outcome)

    def on_load(self, expert: ExpertId) -> None:
        self._usage.on_load(expert)

    def eviction_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        return self._usage.lru_keys()
