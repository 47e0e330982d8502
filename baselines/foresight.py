"""The planner told a part of the future: what its predictions, its start and its evictions lack.

No system but a measure of one (docs/planner.md): each part of the gap to the oracle, one at a time.
"""

from typing import Literal

import numpy as np
from pydantic import validate_call

from baselines.belady import BeladyPolicy
from baselines.planner import PlannerPolicy
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    LayerOutcome,
    ModelShape,
    Priorities,
    Routing,
    Table,
)
from finemoe.options import CHECKED

Part = Literal["nothing", "start", "layers", "eviction", "layers+eviction", "everything"]


class ForesightPolicy(PlannerPolicy):
    """Knows what the planner predicts or expects: predictions are then free, as any oracle's.

    `start`: what the first H layers of a token activate, before they run. `layers`: at the start
    and after every gate, what the next H layers activate, the next token's included. `eviction`:
    when each expert is used next, by which the resident with the farthest use leaves, and a
    prefetch keeps what is needed no later than itself. `everything`: with H = L.
    """

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, of: Part = "layers") -> None:
        super().__init__(shape)
        whole = of == "everything"
        self._layers_known = whole or "layers" in of
        self._start_known = self._layers_known or of == "start"
        self._evicts_by_next_use = whole or "eviction" in of
        self.reach = self._known = shape.layers if whole else self.predictor.horizon
        self._uses = BeladyPolicy(shape)
        self._routed = np.zeros((0, shape.layers, shape.experts))

    def set_future_routing(self, routing: Routing) -> None:
        self._uses.set_future_routing(routing)
        self._routed = np.zeros((len(routing) + 1, *self._routed.shape[1:]))
        for number, layers in enumerate(routing):
            for layer, activated in enumerate(layers):
                self._routed[number, layer, list(activated)] = 1

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities | None:
        super().on_embeddings(iteration, embeddings)
        return self._told(iteration.number, 0)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        super().on_gate(iteration, gate)
        return self._told(iteration.number, gate.layer + 1)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._uses.on_outcome(outcome)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        if not self._evicts_by_next_use:
            return super().eviction_keys(incoming, urgent)
        return self._uses.eviction_keys(incoming, urgent)

    def _told(self, number: int, following: int) -> Priorities | None:
        """Plan with the truth where it is known, before layer `following` runs."""
        layers = self.shape.layers
        stop = following + self._known if self._layers_known else self._known
        if self._start_known and following < stop:
            self._likely[following:stop] = self._routed[number, following:stop]
        if self._layers_known and stop > layers:
            over = min(stop - layers, following)
            self._likely[:over] = self._routed[number + 1, :over]
        return self._plan(following)
