"""Resident: every expert on the device before serving begins; the bound without offloading."""

from finemoe.offload.policy import ModelShape, Placement, Policy


class ResidentPolicy(Policy):
    """Has room for every expert: none is ever evicted, so nobody asks for an order."""

    placement = Placement(everything_resident=True)

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
