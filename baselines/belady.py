"""Belady: no prefetch, and perfect eviction, from the routing that is told beforehand.

The expert whose next use is farthest leaves first, one that is never used again before all others
(L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import (
    ExpertId,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
    Routing,
)

FloatTable = NDArray[np.float64]


class BeladyPolicy(Policy):
    """Knows of every expert when it is used next; steps count layers over all iterations."""

    placement = Placement(foresight=True)

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._routing: Routing = ()
        self._uses: dict[ExpertId, list[int]] = {}
        self._step = 0
        self._next_use: FloatTable = np.full((shape.layers, shape.experts), np.inf)

    def foretell(self, routing: Routing) -> None:
        self._routing, self._uses, self._step = routing, {}, 0
        for number in reversed(range(len(routing))):
            for layer, activated in enumerate(routing[number]):
                for index in activated:
                    uses = self._uses.setdefault(ExpertId(layer, index), [])
                    uses.append(number * self.shape.layers + layer)
        self._next_use[:] = np.inf
        for expert, uses in self._uses.items():
            self._next_use[expert] = uses[-1]

    def on_outcome(self, outcome: LayerOutcome) -> None:
        """Move on to the next uses; ValueError if the layer did not route as foretold."""
        if not self._routing:
            return
        self._check(outcome)
        step = outcome.iteration.number * self.shape.layers + outcome.layer
        self._skip_to(step)
        self._step = step + 1
        for index in outcome.activated:
            self._advance(ExpertId(outcome.layer, index))

    def eviction_keys(self, incoming: ExpertId) -> FloatTable:
        return self._next_use

    def _check(self, outcome: LayerOutcome) -> None:
        number, layer = outcome.iteration.number, outcome.layer
        foretold = self._routing[number][layer] if number < len(self._routing) else None
        if outcome.activated != foretold:
            raise ValueError(
                f"layer {layer} of iteration {number} activated {outcome.activated}, but "
                f"{foretold} was foretold; foretell the routing of the same requests"
            )

    def _skip_to(self, step: int) -> None:
        """Forget the uses before a step: a repeat begins where the numbers of the last one end."""
        if step > self._step:
            self._step = step
            for expert in self._uses:
                self._advance(expert)

    def _advance(self, expert: ExpertId) -> None:
        uses = self._uses[expert]
        while uses and uses[-1] < self._step:
            uses.pop()
        self._next_use[expert] = uses[-1] if uses else np.inf
