"""Belady: no prefetch, and perfect eviction, from the routing that is known beforehand.

The expert whose next use is farthest leaves first, one that is never used again before all others
(L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).
"""

import itertools

import numpy as np

from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Policy, Routing, Table


def uses(routing: Routing, shape: ModelShape) -> tuple[Table, list[list[float]]]:
    """Return the first use of every expert, (L, J), and step by step the uses that come next.

    Steps count layers over all iterations; of each step's activated experts the next uses are
    given, in their order. What never comes is infinite.
    """
    activated = list(itertools.chain.from_iterable(routing))
    widths = [len(indices) for indices in activated]
    steps = np.arange(len(activated)).repeat(np.array(widths, np.int64))
    indices = np.fromiter(itertools.chain.from_iterable(activated), np.int64, len(steps))
    experts = steps % shape.layers * shape.experts + indices
    first = np.full(shape.layers * shape.experts, np.inf)
    np.minimum.at(first, experts, steps)
    order = experts.argsort(kind="stable")
    earlier, later = order[:-1], order[1:]
    again = experts[earlier] == experts[later]
    following = np.full(len(steps), np.inf)
    following[earlier[again]] = steps[later[again]]
    left = iter(following.tolist())
    by_step = [list(itertools.islice(left, width)) for width in widths]
    return first.reshape(shape.layers, shape.experts), by_step


class BeladyPolicy(Policy):
    """Knows of every expert when it is used next; steps count layers over all iterations."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.set_future_routing(())

    def set_future_routing(self, routing: Routing) -> None:
        self._routing, self._step = routing, 0
        self._next_use, self._following = uses(routing, self.shape)

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
