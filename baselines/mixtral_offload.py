"""Mixtral-Offloading (arXiv 2312.17238): the next layer's gate guesses from this layer's input.

Its quantisation is left out, so results stay lossless, and so are its staging buffers, whose place
the engine's slots take. The cache follows dvmazur/mixtral-offloading: each layer is an eviction
group of its own (src/expert_cache.py) with as many experts on the device as any other
(src/build_model.py), least recently used first out.
"""

from typing import Literal

import numpy as np
from pydantic import validate_call

from baselines.speculation import SpeculatingPolicy
from finemoe.offload.policy import ModelShape, Placement, Table
from finemoe.options import CHECKED, Count
from finemoe.selection import top_experts

DISTANCE = 1  # layers that the guess looks ahead (section 6.1 of the FineMoE paper)


class MixtralOffloadPolicy(SpeculatingPolicy):
    """After each gate asks for the top-K that the next gate would choose for the same input.

    A layer waits for them or goes on (docs/fidelity.md). At most `experts` are asked for a layer, 1
    or 2 in its report; None: K of every token.
    """

    @validate_call(config=CHECKED)
    def __init__(
        self,
        shape: ModelShape,
        prefetching: Literal["awaited", "asynchronous"] = "awaited",
        experts: Count | None = None,
    ) -> None:
        super().__init__(shape, DISTANCE, shape.top_k)
        awaited = prefetching == "awaited"
        self.placement = Placement("critical_path", hidden_states=True, awaited=awaited)
        self._most = experts

    def _rank(self, first: int, probabilities: Table) -> Table:
        return np.where(top_experts(probabilities, self._most), probabilities, 0.0)
