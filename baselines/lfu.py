"""LFU and LFRU: no prediction, no prefetch; what was used least, or least lately, leaves."""

from typing import Literal

import numpy as np
from pydantic import validate_call

from finemoe.offload.eviction import UsageTable
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Table
from finemoe.options import CHECKED


class LfuPolicy(UsageTable):
    """Loads an expert when its gate has chosen it; of equal counts the least recently used goes.

    Counts are `kept` when an expert leaves (section 4.5 of the FineMoE paper speaks of the cache
    visit count and of no reset), or `forgotten`, as in the authors' demo and in libCacheSim.
    """

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, counts: Literal["kept", "forgotten"] = "kept") -> None:
        super().__init__(shape)
        self._forgets = counts == "forgotten"

    def on_evict(self, expert: ExpertId) -> None:
        if self._forgets:
            self.visits[expert] = 0
            self._keys[expert] = self._recency[expert]


class LfruPolicy(UsageTable):
    """The expert of the smallest f / (age + 1) leaves: its uses so far, and layers since the last.

    Counts are kept when an expert leaves.
    """

    def forget(self) -> None:
        super().forget()
        self._layers_run = 0
        self._last_use = np.zeros((self.shape.layers, self.shape.experts))

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        self._layers_run += 1
        self._last_use[outcome.layer, list(outcome.activated)] = self._layers_run

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return -self.visits / (self._layers_run - self._last_use + 1)
