"""LFU, LFRU and ClassLRU: no prediction, no prefetch; what was used least or longest ago leaves."""

from typing import Literal

import numpy as np
from pydantic import validate_call

from finemoe.offload.eviction import Recency, UsageTable
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Table
from finemoe.options import CHECKED

HALF_LIFE = 128  # tokens after which a use counts half
LAST_CLASS = 7  # of eight
LARGEST_BATCH = 32  # tokens up to which an iteration fills the cache


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


class LfruPolicy(UsageTable):
    """The expert of the smallest f / (age + 1) leaves: all its uses, and layers since the last."""

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


class ClassLruPolicy(Recency):
    """llama.cpp's expert cache: the largest age / 2^class leaves, age in layers since the last use.

    Each use counts half as much after HALF_LIFE tokens; the class is the binary logarithm of the
    count, rounded down, from 0 to LAST_CLASS. The public proposals of such a cache,
    ggml-org/llama.cpp pull requests 24524 and 27861, tell of hot experts and of recency; the
    classes are known from a description at second hand.

    There, iterations of more than LARGEST_BATCH tokens read the cache and do not fill it. Here an
    expert needs a slot to compute, which no policy can refuse. So what such an iteration loads
    leaves before all others, until a smaller one uses it, and its uses do not count: a prompt
    displaces a few experts all the same, and what it left in free slots may be hit.
    """

    def forget(self) -> None:
        super().forget()
        self._layers_run, self._tokens = 0, 0.0
        size = (self.shape.layers, self.shape.experts)
        self._last_use, self._counts, self._counted = np.zeros(size), np.zeros(size), np.zeros(size)
        """When, in layers, each was used last, how often, and as of which token that is."""
        self._passing = np.zeros(size, dtype=bool)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        tokens = sum(outcome.iteration.tokens)
        self._layers_run += 1
        self._tokens += tokens / self.shape.layers
        if tokens > LARGEST_BATCH:
            loaded = outcome.layer, [*outcome.late, *outcome.misses]
            self._last_use[loaded], self._passing[loaded] = self._layers_run, True
            return
        used = outcome.layer, list(outcome.activated)
        self._counts[used] = 1 + self._counts_now()[used]
        self._counted[used], self._last_use[used] = self._tokens, self._layers_run
        self._passing[used] = False

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        age = self._layers_run - self._last_use
        classes = np.log2(np.maximum(self._counts_now(), 1)).clip(max=LAST_CLASS)
        return np.where(self._passing, self._layers_run + 1 + age, age / 2 ** np.floor(classes))

    def _counts_now(self) -> Table:
        return self._counts * 2 ** ((self._counted - self._tokens) / HALF_LIFE)
