"""On demand: no prediction, no prefetch; the least recently used expert leaves the cache."""

from finemoe.offload.eviction import Recency


class OnDemandPolicy(Recency):
    """Loads an expert when its gate has chosen it."""
