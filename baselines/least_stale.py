"""Least-Stale with speculation (SpecMD, arXiv 2602.03921): experts that the pass is through leave.

A model visits its layers in turn, so what it used last it needs last: recency misleads. An expert
is current if it was loaded for the forward pass that runs, or used by it, and its layer is still
to come; otherwise it is stale. Stale ones leave first, in the order in which they entered. The
definition is that of public summaries (e1n00r/tinyserve, tinyserve/cache_policy.py: an expert
enters when it is loaded, and again when another pass uses it), and that experts of layers that
have run are stale as well; the paper's own code is not public.

The next layer's gate, applied to this layer's input, speculates on the K best experts of each
token, in the background.
"""

from typing import Literal

import numpy as np
from pydantic import validate_call

from baselines.speculation import SpeculatingPolicy
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Placement, Table
from finemoe.options import CHECKED

DISTANCE = 1  # layers that the guess looks ahead
TIER = 2.0**40  # more than experts ever enter


class LeastStalePolicy(SpeculatingPolicy):
    """Of stale experts the one that entered first leaves (`fifo`), or the one visited last.

    With `next_visit`, the layer that has just run comes first, then the one before it; "spatial
    locality", which the paper's summary names beside the temporal one, may mean this.
    """

    placement = Placement("background", hidden_states=True)

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, order: Literal["fifo", "next_visit"] = "fifo") -> None:
        super().__init__(shape, DISTANCE, shape.top_k)
        self._by_visit = order == "next_visit"

    def forget(self) -> None:
        super().forget()
        self._pass = self._layer = -1
        self._entries = 0
        self._entered = np.zeros((self.shape.layers, self.shape.experts))
        self._pass_of = np.full(self._entered.shape, -1)
        """The pass in which each expert entered last, -1 if it is absent."""

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._pass, self._layer = outcome.iteration.number, outcome.layer
        for index in outcome.activated:
            self._enter(ExpertId(outcome.layer, index))

    def on_load(self, expert: ExpertId) -> None:
        self._enter(expert)

    def on_evict(self, expert: ExpertId) -> None:
        self._pass_of[expert] = -1

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        layers = np.arange(self.shape.layers)[:, None]
        stale = (layers <= self._layer) | (self._pass_of != self._pass)
        visit = (layers - self._layer - 1) % self.shape.layers if self._by_visit else 0
        return TIER * stale * (1 + visit) - self._entered

    def _enter(self, expert: ExpertId) -> None:
        if self._pass_of[expert] != self._pass:
            self._entries += 1
            self._entered[expert], self._pass_of[expert] = self._entries, self._pass
