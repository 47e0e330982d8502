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

Time is bounded by the longest path through stretches of loads and layers of compute, whatever the
slots hold when a stretch begins: docs/planner.md.
"""

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import ModelShape, Routing, Table

Stay = tuple[float, int]  # when an expert is used next, and its flat index
STRETCHES = 4  # begin in an iteration: more take longer, and raise the bound by some per cent
LONGEST = 8  # iterations of a stretch


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
    first, following = next_uses(measured, shape)
    steps = enumerate(zip(itertools.chain.from_iterable(measured), following, strict=True))
    stays = [
        [(use, step % shape.layers * shape.experts + j) for j, use in zip(*uses, strict=True)]
        for step, uses in steps
    ]
    warm = sorted((use, e) for e, use in enumerate(first.ravel().tolist()) if use < math.inf)

    def on(device: int, stays: list[Stay]) -> list[Stay]:
        return [stay for stay in stays if stay[1] % len(slots) == device]

    return tuple(
        _fewest_loads([on(n, uses) for uses in stays], on(n, warm) * bool(measured_from), count)
        for n, count in enumerate(slots)
    )


def _fewest_loads(following: list[list[Stay]], stays: list[Stay], slots: int) -> int:
    """Return a device's loads; of its `stays`, ascending, those that end last are given up."""
    if any(following) and slots < 1:
        raise ValueError("a device that experts live on has no slot; raise memory_budget")
    loads = 0
    del stays[slots:]
    for step, uses in enumerate(following):
        if not uses:
            continue
        kept = bisect_left(stays, (step + 1,))
        loads += len(uses) - kept
        del stays[:kept], stays[slots - 1 :]
        for stay in uses:
            if stay[0] < math.inf:
                insort(stays, stay)
        del stays[slots:]
    return loads


def critical_path(
    routing: Routing,
    shape: ModelShape,
    slots: Sequence[int],
    layer_s: Sequence[float],
    load_s: float,
    shared_s: float = 0.0,
) -> float:
    """Return the seconds that compute and loads take at least, as each holds up the other.

    `layer_s` are the seconds of each layer's compute, over all iterations; `load_s` those of an
    expert on its link, and `shared_s` those that it takes of what all links share. Any contents of
    the slots are granted at the start. Raises ValueError as `minimal_loads`.
    """
    first, following = next_uses(routing, shape)
    devices, most = len(slots), max(slots)
    upcoming = np.append(first, np.full(-shape.size % devices, np.inf))
    gap = max(1, shape.layers // STRETCHES)
    rows = -(-LONGEST * shape.layers // gap)
    began, loads = np.full(rows, -np.inf), np.zeros((rows, devices))
    stays = np.full((rows, devices, most), np.inf)
    """Of each stretch and device, the next uses of what is kept; -1 where there is no slot."""
    missing = np.arange(most) >= np.array(slots)[:, None]
    end, layers = 0.0, itertools.chain.from_iterable(routing)
    for step, (indices, uses) in enumerate(zip(layers, following, strict=True)):
        if step % gap == 0:
            row = step // gap % rows
            began[row], loads[row] = end, 0
            soonest = np.sort(upcoming.reshape(-1, devices), axis=0)[:most].T
            stays[row] = np.inf
            stays[row, :, : soonest.shape[1]] = soonest
            stays[row][missing] = -1
        experts = step % shape.layers * shape.experts + np.array(indices, np.intp)
        upcoming[experts] = uses
        used = np.bincount(experts % devices, minlength=devices)
        hit = stays == step
        loads += used - np.count_nonzero(hit, axis=2)
        stays[hit] = np.inf
        _change_last(stays, np.maximum, np.where(used > 0, np.inf, -np.inf))
        for turn in _by_device(experts % devices, uses, devices):
            _change_last(stays, np.minimum, turn)
        seconds = np.maximum(loads.max(axis=1) * load_s, loads.sum(axis=1) * shared_s)
        end = max(end + layer_s[step], float((began + seconds).max()))
    return end


def _by_device(places: NDArray[np.intp], uses: Sequence[float], devices: int) -> list[Table]:
    """Return the uses of each device, one at a time, infinite where it has no more."""
    turns: list[Table] = []
    taken = [0] * devices
    for device, use in zip(places.tolist(), uses, strict=True):
        if taken[device] == len(turns):
            turns.append(np.full(devices, np.inf))
        turns[taken[device]][device] = use
        taken[device] += 1
    return turns


def _change_last(stays: Table, choose: np.ufunc, by: Table) -> None:
    """Let the stay that ends last, of each stretch and device, end when `choose` says."""
    rows, devices, most = stays.shape
    flat = stays.reshape(-1)
    last = stays.argmax(axis=2).reshape(-1) + np.arange(0, len(flat), most)
    flat[last] = choose(flat[last].reshape(rows, devices), by).reshape(-1)


def next_uses(routing: Routing, shape: ModelShape) -> tuple[Table, list[list[float]]]:
    """Return the first use of every expert, (L, J), and step by step the uses that come next.

    Steps count layers over all iterations; of each step's activated experts the next uses are
    given, in their order. What never comes is infinite. Raises ValueError for an iteration with a
    wrong number of layers.
    """
    for layers in routing:
        if len(layers) != shape.layers:
            raise ValueError(f"an iteration has {len(layers)} layers, the model {shape.layers}")
    activated = list(itertools.chain.from_iterable(routing))
    widths = [len(indices) for indices in activated]
    steps = np.arange(len(activated)).repeat(np.array(widths, np.int64))
    indices = np.fromiter(itertools.chain.from_iterable(activated), np.int64, len(steps))
    experts = steps % shape.layers * shape.experts + indices
    first = np.full(shape.size, np.inf)
    np.minimum.at(first, experts, steps)
    order = experts.argsort(kind="stable")
    earlier, later = order[:-1], order[1:]
    again = experts[earlier] == experts[later]
    following = np.full(len(steps), np.inf)
    following[earlier[again]] = steps[later[again]]
    left = iter(following.tolist())
    by_step = [list(itertools.islice(left, width)) for width in widths]
    return first.reshape(shape.layers, shape.experts), by_step


@dataclass(frozen=True)
class Roofline:
    """Seconds that serving takes at least: its compute, its loads, or the longest path of both."""

    compute_s: float  # compute alone, with every expert resident
    link_s: float
    """Loads of a device times the seconds of one expert on its link, the largest over devices."""
    path_s: float  # see `critical_path`; 0 where nobody knows the seconds of each layer

    @property
    def total(self) -> float:
        return max(self.compute_s, self.link_s, self.path_s)

    def times(self, measured_s: float) -> float:
        """Return how many times the bound a measured duration is; ValueError if the bound is 0."""
        if not self.total > 0:
            raise ValueError("the bound is 0 s; give the time of compute or of the loads")
        return measured_s / self.total
