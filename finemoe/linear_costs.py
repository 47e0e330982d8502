"""A cost model of straight lines: what a calibration of this machine fits to its measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from finemoe.offload.replay import IterationCosts, PredictionCosts, ThreadCosts


@dataclass(frozen=True)
class Line:
    """Seconds of an operation: `base`, and more for every token it computes or attends to."""

    base: float
    per_token: float = 0.0
    per_context: float = 0.0

    def at(self, tokens: int, context: int = 0) -> float:
        return self.base + self.per_token * tokens + self.per_context * context


@dataclass(frozen=True)
class LinearCosts:
    """The costs of one model on one machine; a `CostModel`."""

    start: Line
    dense: Line
    finish: Line
    expert_line: Line
    collect: float = 0.0
    hop: float = 0.0
    prediction: PredictionCosts = field(default_factory=PredictionCosts)
    parallel: bool = False
    prediction_source: str = ""
    thread: ThreadCosts = field(default_factory=ThreadCosts)

    def iteration(self, tokens: Sequence[int], contexts: Sequence[int]) -> IterationCosts:
        computed, attended = sum(tokens), sum(contexts)
        return IterationCosts(
            self.start.at(computed, attended),
            self.dense.at(computed, attended),
            self.finish.at(computed, attended),
        )

    def expert(self, tokens: int) -> float:
        return self.expert_line.at(tokens)
