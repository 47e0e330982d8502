"""What a runtime tells, live or in virtual time, and what virtual time is made of."""

import operator
from collections.abc import Callable, Sequence
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
        return PhaseSeconds(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class IterationCosts:
    """Seconds of one forward pass, apart from experts."""

    start: float  # from its beginning to the attention of the first MoE layer
    dense: float  # from the end of one MoE layer to the decision of the next gate
    finish: float  # from the end of the last MoE layer to the tokens on the host


@dataclass(frozen=True)
class PredictionCosts:
    """Seconds that calls of a policy take on the host."""

    embeddings: float = 0.0
    gate: float = 0.0
    update: float = 0.0
    # On top, for every token of the iteration but one.
    embeddings_token: float = 0.0
    gate_token: float = 0.0
    update_token: float = 0.0

    def of(self, tokens: int) -> "PredictionCosts":
        """Return what the calls take in an iteration of so many tokens."""
        more = tokens - 1
        if not more:
            return self
        return PredictionCosts(
            self.embeddings + more * self.embeddings_token,
            self.gate + more * self.gate_token,
            self.update + more * self.update_token,
        )


@dataclass(frozen=True)
class Extra:
    """Seconds that a part of a layer takes more than in a thread that is never disturbed."""

    after_wait: float = 0.0
    """If the thread waited since the part last ran: caches and core are not as it left them."""
    while_copying: float = 0.0  # if a link copies: its thread takes turns with this one


@dataclass(frozen=True)
class ThreadCosts:
    """What waits and copies cost the model's thread; all zero where nobody measured it."""

    resume: float = 0.0  # seconds from the arrival that ends a wait until the thread goes on
    dense: Extra = Extra()
    expert: Extra = Extra()


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Where virtual time comes from; subclasses say what computation takes."""

    prediction: PredictionCosts = PredictionCosts()
    prediction_source: str = ""  # of which system and model that was measured, in words
    parallel: bool = False  # whether devices compute their experts at the same time
    collect: float = 0.0
    """Seconds on the critical path to hand one context (embeddings or gate) to the policy."""
    hop: float = 0.0  # seconds to send a layer's tokens to another device and back
    thread: ThreadCosts = ThreadCosts()

    def iteration(self, tokens: Sequence[int], contexts: Sequence[int]) -> IterationCosts:
        """Return the costs for a batch: each request's tokens now, and those it attends to."""
        raise NotImplementedError

    def expert(self, tokens: int) -> float:
        """Return the seconds of one expert's computation for `tokens` tokens."""
        raise NotImplementedError

    def host(self, tokens: int) -> float:
        """Return the same on the host, the tokens' way there and back included."""
        raise NotImplementedError("nobody says how fast the host computes")
