"""What no system can beat: the fewest expert loads, and the time that compute and links take alone.

Lossless serving must have each activated expert in a slot while it computes. Between two uses in a
row an expert stayed in its slot, or it was loaded again: a system's loads are its uses less the
stays that it kept, so the most stays bound the loads. Between two layers a device keeps at most as
many as it has slots; while it computes a layer, one slot less, for at least one expert of the layer
needs one at a time. Prefetching moves a load to an earlier moment, but saves none.
Stays are intervals on a line, so sweeping it and giving up, wherever there are too many, those that
end last is optimal: any other choice can be exchanged for this one without losing an interval.
Where a device runs one expert a layer that is Belady's MIN. For larger sets the bound grants what
no order of computation forbids, also that an expert computes and leaves before the next one of its
layer arrives; so it holds for layers wider than the slots, too, which run in waves.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from finemoe.offload.policy import ModelShape, Routing

Uses = list[tuple[int, list[int]]]  # steps at which a device has work, and its experts there, flat


def minimal_loads(
    routing: Routing, shape: ModelShape, slots: Sequence[int], measured_from: int = 0
) -> tuple[int, ...]:
    """Return, per device, the fewest expert loads of any system, with or without prefetching.

    Expert (l, j) lives on device (l * J + j) mod devices, which has `slots[device]` slots. They are
    empty at first; a budget that is filled with every expert before serving needs no loads.
    With `measured_from`, only loads from that iteration on count, and each slot may hold any
    expert when it begins, at no cost: whatever earlier iterations left there is one such content.
    Raises ValueError for iterations with a wrong number of layers, for no device, and for a device
    that has work but no slot.
    """
    if not slots:
        raise ValueError("slots=(): a bound needs at least one device")
    measured = routing[measured_from:]
    return tuple(
        _fewest_loads(uses, count, warm=measured_from > 0)
        for uses, count in zip(_by_device(measured, shape, len(slots)), slots, strict=True)
    )


@dataclass(frozen=True)
class Roofline:
    """Seconds that serving takes at least: its compute, or its loads over the busiest link."""

    compute_s: float  # compute alone, with every expert resident
    link_s: float
    """Loads of a device times the seconds of one expert on its link, the largest over devices."""

    @property
    def total(self) -> float:
        return max(self.compute_s, self.link_s)

    def times(self, measured_s: float) -> float:
        """Return how many times the bound a measured duration is; ValueError if the bound is 0."""
        if not self.total > 0:
            raise ValueError("the bound is 0 s; give the time of compute or of the loads")
        return measured_s / self.total


def _by_device(routing: Routing, shape: ModelShape, devices: int) -> list[Uses]:
    uses: list[Uses] = [[] for _ in range(devices)]
    for number, layers in enumerate(routing):
        if len(layers) != shape.layers:
            raise ValueError(f"an iteration has {len(layers)} layers, the model {shape.layers}")
        for layer, activated in enumerate(layers):
            step = number * shape.layers + layer
            shares: dict[int, list[int]] = {}
            for index in activated:
                expert = layer * shape.experts + index
                shares.setdefault(expert % devices, []).append(expert)
            for device, experts in shares.items():
                uses[device].append((step, experts))
    return uses


def _fewest_loads(uses: Uses, slots: int, warm: bool) -> int:
    if uses and slots < 1:
        raise ValueError("a device that experts live on has no slot; raise memory_budget")
    stays: list[tuple[int, int]] = []
    """Next use and expert, ascending: what is too many ends last and is given up."""
    if warm:
        first = {e: step for step, experts in reversed(uses) for e in experts}
        stays = sorted((step, expert) for expert, step in first.items())[:slots]
    loads = 0
    for (step, experts), following in zip(uses, _next_uses(uses), strict=True):
        kept = bisect_left(stays, (step + 1,))
        loads += len(experts) - kept
        del stays[:kept], stays[slots - 1 :]
        for expert, until in zip(experts, following, strict=True):
            if until is not None:
                insort(stays, (until, expert))
        del stays[slots:]
    return loads


def _next_uses(uses: Uses) -> list[list[int | None]]:
    found: list[list[int | None]] = []
    known: dict[int, int] = {}
    for step, experts in reversed(uses):
        found.append([known.get(expert) for expert in experts])
        known.update((expert, step) for expert in experts)
    return found[::-1]
