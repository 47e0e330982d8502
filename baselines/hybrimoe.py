"""HybriMoE (arXiv 2504.05897, DAC '25): a schedule for device, link and host, layer by layer.

- Schedule: experts in order of load, resident ones first; the device takes from the front, after
  the copy if one is missing, and the host from the back. Who would end sooner takes the next one,
  by a simulation of the three timelines (`HSS` in the public code,
  github.com/PKU-SEC-Lab/HybriMoE, ktransformers/operators/experts.py).
- Cache: each layer has as many slots, as in the code; the expert of the lowest score leaves,
  S <- alpha TopP(s) + (1 - alpha) S, where TopP keeps the P largest of the gate's probabilities s
  ("minus recent score"; alpha 0.5, and P = 2 K, as the code's 12 are for models of top-6).
- Prefetch: gates of the next three layers, applied to this layer's input, tell which experts they
  will want; those come first whose presence would shorten their layer's schedule most.

Read otherwise than the code: the schedule also holds for prefills, as in the paper, where the code
sends all experts to the device; s is the mean over tokens, where the code sees the first one; and
residents stay on the device, where the code's host may take one that waits for nothing. An expert
belongs to one device; of several, each has its own timeline and link.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import validate_call

from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    GateWeights,
    Iteration,
    Machine,
    ModelShape,
    Need,
    Placement,
    Policy,
    Priorities,
    Table,
)
from finemoe.options import CHECKED, Count, Share


def by_load(experts: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Return experts with most tokens first; of equal ones the lower index."""
    return sorted(experts, key=lambda index: (-tokens[index], index))


Work = tuple[int, float, float]  # an expert's device, and its seconds there and on the host


def schedule(
    busy: Sequence[float], missing: Sequence[Work], load: float, copying: Sequence[float] = ()
) -> tuple[int, float]:
    """Return how many missing experts, from the back, the host computes, and when the layer ends.

    `busy` are the seconds that devices need for their residents, `load` those of one copy, and
    `copying` those that links need for what they have begun.
    """
    devices, links = list(busy), list(copying) or [0.0] * len(busy)
    front, back, host = 0, len(missing), 0.0
    while front < back:
        device, seconds, _ = missing[front]
        arrived = links[device] + load
        end, host_end = max(devices[device], arrived) + seconds, host + missing[back - 1][2]
        if end <= host_end:
            devices[device], links[device] = end, arrived
            front += 1
        else:
            host = host_end
            back -= 1
    return len(missing) - back, max(host, *devices)


def timed(
    first: int,
    tokens: Sequence[int],
    resident: Sequence[int],
    missing: Sequence[int],
    machine: Machine,
) -> tuple[list[float], list[Work]]:
    """Return what `schedule` takes of a layer whose experts begin with flat index `first`."""
    busy = [0.0] * len(machine.slots)

    def work(index: int) -> Work:
        count = tokens[index]
        return (first + index) % len(busy), machine.device(count), machine.host(count)

    for device, seconds, _ in map(work, resident):
        busy[device] += seconds
    return busy, [work(index) for index in missing]


def divided(
    need: Need, machine: Machine, shape: ModelShape, arriving: Sequence[int] = ()
) -> list[int]:
    """Return which of the missing experts the host computes, so that the layer ends soonest.

    Of the copies of those that are `arriving` half is left on average. To give one up is to compute
    the expert now and at its next use again, so it goes on where it ends sooner than that.
    """
    half = machine.load / 2
    arriving = [index for index in arriving if half <= 2 * machine.host(need.tokens[index])]
    missing = by_load([index for index in need.missing if index not in arriving], need.tokens)
    first = need.layer * shape.experts
    busy, works = timed(first, need.tokens, need.resident, missing, machine)
    links = [0.0] * len(busy)
    for index in arriving:
        device = (first + index) % len(busy)
        links[device] += half
        busy[device] = max(busy[device], links[device]) + machine.device(need.tokens[index])
    count, _ = schedule(busy, works, machine.load, links)
    return missing[len(missing) - count :]


class HybriMoePolicy(Policy):
    """Looks `ahead` layers far; `alpha` is the weight of the last gate in a score."""

    placement = Placement("background", hidden_states=True)

    @validate_call(config=CHECKED)
    def __init__(self, shape: ModelShape, alpha: Share = 0.5, ahead: Count = 3) -> None:
        self.shape = shape
        self._alpha, self._ahead = alpha, ahead
        self._gates: GateWeights | None = None
        self.begin_serving()

    def begin_serving(self) -> None:
        self._scores = np.zeros((self.shape.layers, self.shape.experts))
        self._resident = np.zeros(self._scores.shape, dtype=bool)

    def set_gates(self, gates: GateWeights) -> None:
        self._gates = gates

    def set_machine(self, machine: Machine) -> None:
        self._machine = machine

    def host_experts(self, need: Need) -> list[int]:
        return divided(need, self._machine, self.shape)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities:
        """Note the scores, and ask for what would shorten the next layers."""
        kept = gate.probabilities.copy()
        low = kept.argsort(axis=1)[:, : -2 * self.shape.top_k]
        np.put_along_axis(kept, low, 0.0, axis=1)
        scores = self._scores[gate.layer]
        scores += self._alpha * (kept.mean(axis=0) - scores)
        gains = np.zeros(self._scores.shape)
        for layer in range(gate.layer + 1, min(gate.layer + 1 + self._ahead, self.shape.layers)):
            self._gain(layer, gate.hidden_states, gains[layer])
        return gains

    def _gain(self, layer: int, hidden: FloatArray | None, gains: Table) -> None:
        """Fill in by how many seconds each expert's presence would shorten a layer."""
        assert self._gates is not None
        assert hidden is not None
        ranked = (-self._gates.logits(layer, hidden)).argsort(axis=1, kind="stable")
        chosen = ranked[:, : self.shape.top_k].ravel()
        counts = np.bincount(chosen, minlength=self.shape.experts).tolist()
        wanted, there = by_load(np.unique(chosen).tolist(), counts), self._resident[layer]
        missing = [index for index in wanted if not there[index]]
        resident = [index for index in wanted if there[index]]
        first = layer * self.shape.experts
        busy, works = timed(first, counts, resident, missing, self._machine)
        _, whole = schedule(busy, works, self._machine.load)
        known: dict[Work, float] = {}
        for place, (index, work) in enumerate(zip(missing, works, strict=True)):
            if work not in known:
                device, seconds, _ = work
                with_it = [*busy[:device], busy[device] + seconds, *busy[device + 1 :]]
                others = [*works[:place], *works[place + 1 :]]
                _, end = schedule(with_it, others, self._machine.load)
                known[work] = round(whole - end, 9)  # Nothing is not a little.
            gains[index] = known[work]

    def on_load(self, expert: ExpertId) -> None:
        self._resident[expert] = True

    def on_evict(self, expert: ExpertId) -> None:
        self._resident[expert] = False

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """The lowest score of the layer with most residents; ties: of `incoming`'s own layer."""
        shares = 2.0 * self._resident.sum(axis=1)
        shares[incoming.layer] += 1
        keys: Table = shares[:, None] - self._scores
        return keys
