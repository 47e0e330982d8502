"""Oracle: knows the whole routing, prefetches in order of next use, evicts the farthest next use.

Its wishes are the absent experts that are needed soonest, so every link works through them earliest
deadline first; a resident that is needed before the incoming expert is never given up for it. So a
link fetches what the slots can hold and no more, without the policy knowing how many there are.
Wishes end with the iteration for which they are made: the engine cancels those for a later one
when their layer's gate speaks first, and what was copied of them would be lost.
Its predictions are on the critical path because they are to be there at once: a runtime in virtual
time gives them no cost.
It is greedy: a link that is slow against the layers may evict for a prefetch what a later start
would have spared, so its misses are no proven minimum (P. Cao et al., "A study of integrated
prefetching and caching strategies", 1995, call this rule aggressive). `finemoe.offload.bounds` is
the proven bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baselines.belady import BeladyPolicy, FloatTable
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    LayerOutcome,
    ModelShape,
    Placement,
    Prefetch,
    Routing,
)


class OraclePolicy(BeladyPolicy):
    """Wishes for the next `lookahead` experts of the iteration that are absent, at every event.

    Raises ValueError for a lookahead below 1.
    """

    placement = Placement("critical_path", foresight=True, learns=False)

    def __init__(self, shape: ModelShape, lookahead: int = 64) -> None:
        super().__init__(shape)
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead}: it starts at 1")
        self._lookahead = lookahead
        self._resident = np.zeros((shape.layers, shape.experts), dtype=bool)
        self._demanded: set[ExpertId] = set()

    def foretell(self, routing: Routing) -> None:
        super().foretell(routing)
        self._resident[:] = False
        self._demanded.clear()

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Sequence[Prefetch]:
        self._skip_to(iteration.number * self.shape.layers)
        return self._wishes(iteration.number)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        return self._wishes(iteration.number)

    def end_iteration(self, iteration: Iteration) -> Sequence[Prefetch]:
        return self._wishes(iteration.number + 1)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        for index in (*outcome.late, *outcome.misses):
            self._demanded.add(ExpertId(outcome.layer, index))

    def on_load(self, expert: ExpertId) -> None:
        self._resident[expert] = True
        self._demanded.discard(expert)

    def on_evict(self, expert: ExpertId) -> None:
        self._resident[expert] = False

    def eviction_keys(self, incoming: ExpertId) -> FloatTable:
        """Return next uses, -inf for what is needed no later than a prefetched `incoming`."""
        if incoming in self._demanded:
            return self._next_use
        later = self._next_use > self._next_use[incoming]
        return np.where(later, self._next_use, -np.inf)

    def _wishes(self, number: int) -> list[Prefetch]:
        """Return the absent experts that iteration `number` is still to use, soonest first."""
        due = np.where(self._resident, np.inf, self._next_use).ravel()
        soonest = due.argsort(kind="stable")[: self._lookahead].tolist()
        end = (number + 1) * self.shape.layers
        return [
            Prefetch(ExpertId(*divmod(expert, self.shape.experts)), -float(due[expert]))
            for expert in soonest
            if due[expert] < end
        ]
