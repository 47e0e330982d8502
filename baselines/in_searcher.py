"""Predictions of other systems in FineMoE's searcher (section 6.5, Figure 14a).

Asked in the background, after the gate of layer l, for layer l + d alone: the K likeliest experts
of each query, with FineMoE's priorities, into one cache for all layers. A query is a token for
speculation, a request for the hit count.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import validate_call

from baselines.moe_infinity import MoEInfinityPolicy
from baselines.speculation import SpeculatingPolicy
from finemoe.offload.eviction import UsageTable
from finemoe.offload.policy import ExpertId, FloatArray, ModelShape, Placement, Priorities, Table
from finemoe.options import CHECKED, Count
from finemoe.selection import divisors, select_experts, union_priorities

Eviction = Literal["lru", "lfu"]  # the orders of FineMoE's cache that need no map


class SpeculationInSearcher(UsageTable, SpeculatingPolicy):
    """The gate of layer l + d reads the input of layer l; the first d layers are not predicted."""

    placement = Placement("background", hidden_states=True)

    def __init__(self, shape: ModelShape, distance: int, eviction: Eviction) -> None:
        super().__init__(shape, distance, shape.top_k)
        self._by_recency = eviction == "lru"

    def _rank(self, first: int, probabilities: Table) -> Table:
        return probabilities / self._distance

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return self._recency if self._by_recency else super().eviction_keys(incoming, urgent)


class HitCountInSearcher(MoEInfinityPolicy):
    """Activation ratios of the nearest matrix; the popular experts of the first d layers."""

    def __init__(self, shape: ModelShape, distance: int, eviction: Eviction) -> None:
        super().__init__(shape, distance, eviction=eviction)
        self.placement = Placement("background")

    def _early_priorities(self, shares: Any) -> Priorities:
        return self._likeliest(shares[:, None], range(len(shares)), now=-1)

    def _wanted_by(self, nearest: Sequence[NDArray[np.intp]], layers: slice) -> Priorities:
        distance = self._early
        first, last = layers.start + distance, min(layers.stop + distance, self.shape.layers)
        steps = np.arange(max(last - first, 0))
        ratios = [self.collection.ratios[e[: len(steps)]][steps, first + steps] for e in nearest]
        likeliest = self._likeliest(np.stack(ratios, axis=1), range(distance, distance + 1), now=0)
        wanted = np.zeros((layers.stop - layers.start, self.shape.layers, self.shape.experts))
        wanted[steps, first + steps] = likeliest
        return wanted

    def _likeliest(self, probabilities: FloatArray, band: range, now: int) -> Priorities:
        """Return priorities (N, J) of each query's K likeliest experts, by ratios (N, Q, J)."""
        flat = probabilities.reshape(-1, self.shape.experts)
        chosen = select_experts(flat, np.ones(len(flat)), self.shape.top_k)
        by = divisors(band, now, "paper")
        return union_priorities(probabilities, chosen.reshape(probabilities.shape), by, "paper")


@validate_call(config=CHECKED)
def in_searcher(
    shape: ModelShape,
    predictor: Literal["speculation", "hit_count"],
    prefetch_distance: Count,
    eviction: Eviction = "lru",
) -> SpeculationInSearcher | HitCountInSearcher:
    """Return the policy that conf/system/in_searcher.yaml describes; ValueError for bad options."""
    kind = SpeculationInSearcher if predictor == "speculation" else HitCountInSearcher
    return kind(shape, prefetch_distance, eviction)
