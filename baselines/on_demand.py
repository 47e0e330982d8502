"""On demand: no prediction, no prefetch; the least recently used expert leaves the cache."""

from finemoe.offload.eviction import Recency
from finemoe.offload.policy import ExpertId, Policy, Table


class OnDemandPolicy(Recency, Policy):
    """Loads an expert when its gate has chosen it."""

    def begin_serving(self) -> None:
        self.forget()

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return self._recency
