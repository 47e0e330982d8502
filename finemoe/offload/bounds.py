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
Steps = NDArray[np.int64]  # they count layers over all iterations
NEVER = np.iinfo(np.int64).max
STRETCHES = 4  # begin in an iteration: more take longer, and raise the bound by some per cent
LONGEST = 8  # iterations of a stretch
AT_ONCE = 512  # stretches that are swept side by side: what they keep fits the processor's cache


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
    parts: Sequence[range] = (),
) -> tuple[float, ...]:
    """Return the seconds that compute and loads take at least, as each holds up the other.

    First of all iterations, then of each of `parts` alone, which are ranges of them. `layer_s` are
    the seconds of each layer's compute, over all iterations; `load_s` those of an expert on its
    link, and `shared_s` those that it takes of what all links share. Any contents of the slots are
    granted at the start. Raises ValueError as `minimal_loads`.
    """
    gap = max(1, shape.layers // STRETCHES)
    ages = -(-LONGEST * shape.layers // gap)
    accesses = _accesses(routing, shape)
    turns, starts = _turns(*accesses, len(slots)), np.arange(0, len(layer_s), gap)
    taken = []
    for some in np.array_split(starts, len(starts) // AT_ONCE + 1):
        contents = _best_contents(*accesses[:2], some, shape.size, slots)
        loads = _loads_of_stretches(turns, some, contents, ages * gap)
        taken.append(np.maximum(loads.max(axis=2) * load_s, loads.sum(axis=2) * shared_s))
    seconds, began = np.concatenate(taken).reshape(-1, ages, gap), np.empty(len(starts))

    def longest(iterations: range) -> float:
        first, stop = iterations.start * shape.layers, iterations.stop * shape.layers
        oldest = -(-first // gap)
        end = float(sum(layer_s[first : min(stop, oldest * gap)]))
        for newest in range(oldest, -(-stop // gap)):
            began[newest], start = end, newest * gap
            age = np.arange(min(ages, newest - oldest + 1))
            ends = (began[newest - age, None] + seconds[newest - age, age]).max(axis=0)
            own = layer_s[start : min(stop, start + gap)]
            for layer, at_least in zip(own, ends.tolist(), strict=False):
                end = max(end + layer, at_least)
        return end

    return tuple(map(longest, (range(len(routing)), *parts)))


def _turns(steps: Steps, experts: Steps, following: Steps, devices: int) -> Steps:
    """Return when the n-th expert that a device runs in a step is used next, (steps + 1, D, N).

    -1 where it runs no n-th, and in a step beyond the last.
    """
    work = steps * devices + experts % devices
    order = work.argsort(kind="stable")
    turn = np.empty_like(order)
    turn[order] = np.arange(len(order)) - np.searchsorted(work[order], work[order])
    table = np.full((steps.max(initial=0) + 2, devices, turn.max(initial=0) + 1), -1)
    table[steps, experts % devices, turn] = following
    return table


def _best_contents(
    steps: Steps, experts: Steps, starts: Steps, size: int, slots: Sequence[int]
) -> Steps:
    """Return the next uses of what slots at best hold at some steps, (S, D, slots).

    Those are the soonest ones; -1 where a device has no slot.
    """
    devices, most, end = len(slots), max(slots), steps.max(initial=0) + 1
    uses = np.append(np.sort(experts * end + steps), NEVER)
    asked = np.arange(size) * end
    soonest = uses[np.searchsorted(uses, asked + starts[:, None])] - asked
    soonest[soonest >= end] = NEVER
    soonest = np.pad(soonest, [(0, 0), (0, -size % devices)], constant_values=NEVER)
    soonest = np.sort(soonest.reshape(len(starts), -1, devices).swapaxes(1, 2))[..., :most]
    missing = [(0, 0), (0, 0), (0, most - soonest.shape[2])]
    contents = np.pad(soonest, missing, constant_values=NEVER)
    contents[:, np.arange(most) >= np.array(slots)[:, None]] = -1
    return contents


def _loads_of_stretches(turns: Steps, starts: Steps, contents: Steps, length: int) -> Steps:
    """Return each device's fewest loads since each start, after each step, (S, length, D)."""
    devices, slots = turns.shape[1], contents.shape[2]
    # When they are used next, in a few bits: behind a stretch all are alike, and like free slots.
    free, start = length, starts.repeat(devices)
    stays = (contents.reshape(-1, slots) - start[:, None]).clip(-1, free).astype(np.int16)
    so_far = np.zeros(len(stays), np.int64)
    loads = np.empty((len(starts), length, devices), np.int64)
    for after in range(length):
        steps = np.minimum(starts + after, len(turns) - 1)
        busy = (turns[steps, :, 0] >= 0).ravel().nonzero()[0]
        step, device, kept = steps[busy // devices], busy % devices, stays[busy]
        hit = kept == after
        so_far[busy] -= np.count_nonzero(hit, axis=1)
        np.putmask(kept, hit, free)
        # While a layer computes, one of its experts needs a slot.
        kept[np.arange(len(busy)), kept.argmax(axis=1)] = free
        for use in turns[step, device].T:
            rows = (use >= 0).nonzero()[0]
            if not len(rows):
                break
            last = (kept if len(rows) == len(kept) else kept[rows]).argmax(axis=1)
            relative = np.minimum(use[rows] - start[busy[rows]], free)
            kept[rows, last] = np.minimum(kept[rows, last], relative)
            so_far[busy[rows]] += 1
        stays[busy] = kept
        loads[:, after] = so_far.reshape(-1, devices)
    return loads


def next_uses(routing: Routing, shape: ModelShape) -> tuple[Table, list[list[float]]]:
    """Return the first use of every expert, (L, J), and step by step the uses that come next.

    Steps count layers over all iterations; of each step's activated experts the next uses are
    given, in their order. What never comes is infinite. Raises ValueError for an iteration with a
    wrong number of layers.
    """
    steps, experts, uses = _accesses(routing, shape)
    first = np.full(shape.size, np.inf)
    np.minimum.at(first, experts, steps)
    left = iter(np.where(uses == NEVER, np.inf, uses).tolist())
    layers = itertools.chain.from_iterable(routing)
    by_step = [list(itertools.islice(left, len(activated))) for activated in layers]
    return first.reshape(shape.layers, shape.experts), by_step


def _accesses(routing: Routing, shape: ModelShape) -> tuple[Steps, Steps, Steps]:
    """Return step, flat index and next use of each activated expert; NEVER if there is none."""
    for layers in routing:
        if len(layers) != shape.layers:
            raise ValueError(f"an iteration has {len(layers)} layers, the model {shape.layers}")
    activated = list(itertools.chain.from_iterable(routing))
    widths = np.array(list(map(len, activated)), np.int64)
    steps = np.arange(len(activated)).repeat(widths)
    indices = np.fromiter(itertools.chain.from_iterable(activated), np.int64, len(steps))
    experts = steps % shape.layers * shape.experts + indices
    order = experts.argsort(kind="stable")
    earlier, later = order[:-1], order[1:]
    again = experts[earlier] == experts[later]
    following = np.full(len(steps), NEVER)
    following[earlier[again]] = steps[later[again]]
    return steps, experts, following


@dataclass(frozen=True)
class Roofline:
    """Seconds that serving takes at least: its compute, its loads, or the longest path of both."""

    compute_s: float  # compute alone, with every expert resident
    link_s: float
    """Loads of a device times the seconds of one expert on its link, the largest over devices."""
    path_s: float  # see `critical_path`; 0 where nobody knows the seconds of each layer
    tpot_s: float | None  # mean TPOT, by the longest path of each request's decode alone

    @property
    def total(self) -> float:
        return max(self.compute_s, self.link_s, self.path_s)

    def times(self, measured_s: float) -> float:
        """Return how many times the bound a measured duration is; ValueError if the bound is 0."""
        if not self.total > 0:
            raise ValueError("the bound is 0 s; give the time of compute or of the loads")
        return measured_s / self.total
