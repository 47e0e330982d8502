"""Oracle: knows the whole routing, prefetches in order of next use, evicts the farthest next use.

Links work through the absent experts earliest deadline first, and no resident that is needed before
the incoming expert is given up for it. Requests end with the iteration for which they are made: the
engine cancels those for a later one when their layer's gate speaks first, and what was copied of
them would be lost. Predictions are on the critical path, to be there at once, and cost nothing in
virtual time.
It is greedy: a link that is slow against the layers may evict for a prefetch what a later start
would have spared, so its misses are no proven minimum (P. Cao et al., "A study of integrated
prefetching and caching strategies", 1995, call this rule aggressive). `finemoe.offload.bounds` is
the proven bound.
"""

import numpy as np
from pydantic import validate_call

from baselines.belady import BeladyPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    ModelShape,
    Placement,
    Priorities,
    Routing,
    Table,
)
from finemoe.options import CHECKED, Count


class OraclePolicy(BeladyPolicy):
    """Requests the next `lookahead` experts of the iteration that are absent, at every event."""

    placement = Placement("critical_path")

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, lookahead: Count = 64) -> None:
        super().__init__(shape)
        self._lookahead = lookahead

    def set_future_routing(self, routing: Routing) -> None:
        super().set_future_routing(routing)
        self._absent = np.ones((self.shape.layers, self.shape.experts), dtype=bool)
        self._planned = -1
        self._plan = np.zeros(self._absent.shape)
        self._later = np.empty(self._absent.shape)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        self._go_to(iteration.number * self.shape.layers)
        return self._requests(iteration.number)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities:
        return self._requests(iteration.number)

    def end_iteration(self, iteration: Iteration) -> Priorities:
        return self._requests(iteration.number + 1)

    def on_load(self, expert: ExpertId) -> None:
        self._absent[expert] = False

    def on_evict(self, expert: ExpertId) -> None:
        self._absent[expert] = True

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Farthest next use; a prefetch keeps what is needed no later than itself."""
        keys, (layer, index) = self._next_use, incoming
        if urgent:
            return keys
        self._later.fill(-np.inf)
        np.copyto(self._later, keys, where=keys > keys[layer, index : index + 1])
        return self._later

    def _requests(self, number: int) -> Priorities:
        """Request the absent experts that iteration `number` is still to use, soonest first."""
        if number != self._planned:
            self._planned = number
            self._plan[:] = 0
            routed = self._routing[number] if number < len(self._routing) else ()
            for step, activated in enumerate(routed, number * self.shape.layers):
                self._plan[step % self.shape.layers, list(activated)] = 1 / (1 + step)
        layer = max(self._step - number * self.shape.layers, 0)
        due = self._plan * self._absent
        due[:layer] = 0
        if np.count_nonzero(due) > self._lookahead:
            due.reshape(-1)[due.reshape(-1).nonzero()[0][self._lookahead :]] = 0
        return due
