"""Resident: every expert on the device before serving begins; the bound without offloading."""

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ExpertId, ModelShape, Placement, Policy


class ResidentPolicy(Policy):
    """Has room for every expert, so nothing is ever evicted."""

    placement = Placement(everything_resident=True)

    def __init__(self, shape: ModelShape) -> None:
        self._nothing = np.zeros((shape.layers, shape.experts))

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> NDArray[np.float64]:
        return self._nothing
