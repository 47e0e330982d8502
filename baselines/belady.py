"""Belady: no prefetch, and perfect eviction, from the routing that is known beforehand.

The expert whose next use is farthest leaves first, one that is never used again before all others
(L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).
"""

from finemoe.offload.bounds import next_uses
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Policy, Routing, Table


class BeladyPolicy(Policy):
    """Knows of every expert when it is used next; steps count layers over all iterations."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.set_future_routing(())

    def set_future_routing(self, routing: Routing) -> None:
        self._routing, self._step = routing, 0
        self._next_use, self._following = next_uses(routing, self.shape)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        """Move on to the next uses; ValueError if the layer routes otherwise."""
        if not self._routing:
            return
        number, layer = outcome.iteration.number, outcome.layer
        expected = self._routing[number][layer] if number < len(self._routing) else None
        if outcome.activated != expected:
            raise ValueError(
                f"layer {layer} of iteration {number} activated {outcome.activated}, not "
                f"{expected}; set the future routing of the same requests"
            )
        self._go_to(number * self.shape.layers + layer + 1)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return self._next_use

    def _go_to(self, step: int) -> None:
        """Put the steps before this one behind: a repeat skips those that the last one ran."""
        for gone in range(self._step, min(step, len(self._following))):
            iteration, layer = divmod(gone, self.shape.layers)
            next_use = self._next_use[layer]
            pairs = zip(self._routing[iteration][layer], self._following[gone], strict=True)
            for index, following in pairs:
                next_use[index] = following
        self._step = max(step, self._step)
