"""LFU and LFRU: no prediction, no prefetch; what was used least, or least and longest ago, leaves."""

from typing import Literal

from pydantic import validate_call

from finemoe.offload.eviction import TICK, UsageTable
from finemoe.offload.policy import ExpertId, ModelShape, Policy, Table
from finemoe.options import CHECKED


class LfuPolicy(UsageTable, Policy):
    """Loads an expert when its gate has chosen it; of equal counts the least recently used goes.

    Counts are `kept` when an expert leaves (section 4.5 of the FineMoE paper speaks of the cache
    visit count and of no reset), or `forgotten`, as in the authors' demo and in libCacheSim.
    """

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, counts: Literal["kept", "forgotten"] = "kept") -> None:
        super().__init__(shape)
        self._forgets = counts == "forgotten"

    def begin_serving(self) -> None:
        self.forget()

    def on_evict(self, expert: ExpertId) -> None:
        if self._forgets:
            self.visits[expert] = 0

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return self.lfu_keys()


class LfruPolicy(UsageTable, Policy):
    """The expert of the smallest f / (age + 1) leaves: its uses so far, and layers since the last.

    A load counts as a layer. Counts are kept when an expert leaves.
    """

    def begin_serving(self) -> None:
        self.forget()

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        age = (self._recency - self._now) / TICK
        return -self.visits / (age + 1)
