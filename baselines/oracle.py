"""Oracle: knows the whole routing, prefetches in order of next use, evicts the farthest next use.

Links work through the absent experts earliest deadline first, and no resident that is needed before
the incoming expert is given up for it. Requests reach as far as the next visit of every layer, the
next iteration's included, and cost nothing in virtual time.
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
)
from finemoe.options import CHECKED, Count


class OraclePolicy(BeladyPolicy):
    """Requests the next `lookahead` absent experts of the next L layers, at every event."""

    placement = Placement("critical_path", displaces_less=True, wraps=True)

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, lookahead: Count = 64) -> None:
        super().__init__(shape)
        self._lookahead = lookahead

    def set_future_routing(self, routing: Routing) -> None:
        super().set_future_routing(routing)
        self._absent = np.ones((self.shape.layers, self.shape.experts), dtype=bool)
        self._plan = np.zeros(self._absent.shape)
        for layer in range(self.shape.layers):
            self._plan_visit(0, layer)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        first = iteration.number * self.shape.layers
        if first != self._step:  # a repeat: warm-up and measured requests may follow each other
            for layer in range(self.shape.layers):
                self._plan_visit(iteration.number, layer)
        self._go_to(first)
        return self._requests(0)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities:
        self._plan_visit(iteration.number + 1, gate.layer)
        return self._requests(gate.layer + 1)

    def end_iteration(self, iteration: Iteration) -> Priorities:
        return self._requests(0)

    def on_load(self, expert: ExpertId) -> None:
        self._absent[expert] = False

    def on_evict(self, expert: ExpertId) -> None:
        self._absent[expert] = True

    def _plan_visit(self, number: int, layer: int) -> None:
        """Plan for what a layer activates in an iteration, the sooner the more."""
        self._plan[layer] = 0
        if number < len(self._routing):
            step = number * self.shape.layers + layer
            self._plan[layer, list(self._routing[number][layer])] = 1 / (1 + step)

    def _requests(self, following: int) -> Priorities:
        """Request absent experts, soonest first, before layer `following` runs."""
        due = self._plan * self._absent
        if np.count_nonzero(due) > self._lookahead:
            first = following * self.shape.experts
            soonest = np.roll(due.reshape(-1), -first).nonzero()[0] + first
            due.reshape(-1)[soonest[self._lookahead :] % due.size] = 0
        return due
