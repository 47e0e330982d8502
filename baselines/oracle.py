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

import itertools
from collections.abc import Sequence

from pydantic import validate_call

from baselines.belady import BeladyPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    ModelShape,
    Placement,
    Prefetch,
    Routing,
)
from finemoe.options import CHECKED, Count


class OraclePolicy(BeladyPolicy):
    """Wishes for the next `lookahead` experts of the iteration that are absent, at every event."""

    placement = Placement("critical_path", foresight=True, learns=False)

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, lookahead: Count = 64) -> None:
        super().__init__(shape)
        self._lookahead = lookahead

    def foretell(self, routing: Routing) -> None:
        super().foretell(routing)
        self._resident: set[ExpertId] = set()
        self._planned = -1
        self._plan: list[list[Prefetch]] = []

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Sequence[Prefetch]:
        self._go_to(iteration.number * self.shape.layers)
        return self._wishes(iteration.number)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        return self._wishes(iteration.number)

    def end_iteration(self, iteration: Iteration) -> Sequence[Prefetch]:
        return self._wishes(iteration.number + 1)

    def on_load(self, expert: ExpertId) -> None:
        self._resident.add(expert)

    def on_evict(self, expert: ExpertId) -> None:
        self._resident.discard(expert)

    def eviction_floor(self, incoming: ExpertId) -> float:
        """Keep what is needed no later than a prefetched `incoming`."""
        return self._next_use.item(incoming)

    def _wishes(self, number: int) -> list[Prefetch]:
        """Return the absent experts that iteration `number` is still to use, soonest first."""
        if number != self._planned:
            self._planned, self._plan = number, self._layers(number)
        layer = max(self._step - number * self.shape.layers, 0)
        due = itertools.chain.from_iterable(self._plan[layer:])
        resident = self._resident
        absent = (wish for wish in due if wish.expert not in resident)
        return list(itertools.islice(absent, self._lookahead))

    def _layers(self, number: int) -> list[list[Prefetch]]:
        """Return wishes for all that an iteration uses, by layer."""
        routed = self._routing[number] if number < len(self._routing) else ()
        first = number * self.shape.layers
        return [
            [Prefetch(ExpertId(layer, index), -float(first + layer)) for index in activated]
            for layer, activated in enumerate(routed)
        ]
