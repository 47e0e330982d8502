"""What the live runtime and the replay share."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

from finemoe.offload.policy import LayerOutcome

OutcomeListener = Callable[[LayerOutcome], None]

SEARCH_QUEUE_ITERATIONS = 2
"""How many iterations' contexts may wait for the searcher before inference waits for it."""


@dataclass
class PhaseSeconds:
    """Where time goes, in seconds; the first three are always on the critical path (figure 17)."""

    context_collection: float = 0.0
    on_demand_wait: float = 0.0
    prefetch_wait: float = 0.0
    search: float = 0.0
    prefetch_issue: float = 0.0
    update: float = 0.0

    def __add__(self, other: "PhaseSeconds") -> "PhaseSeconds":
        mine, theirs = astuple(self), astuple(other)
        return PhaseSeconds(*(a + b for a, b in zip(mine, theirs, strict=True)))
