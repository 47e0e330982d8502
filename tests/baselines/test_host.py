"""Fiddler, HybriMoE and FreeToken's split: who computes what is missing, by hand and as laws."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from baselines.fiddler import FiddlerPolicy
from baselines.freetoken import FreeTokenPolicy
from baselines.hybrimoe import HybriMoePolicy, schedule
from baselines.planner import HostPlannerPolicy
from finemoe.costs import Line
from finemoe.offload.policy import (
    ExpertId,
    GateWeights,
    Iteration,
    LayerOutcome,
    Machine,
    ModelShape,
    Need,
    Placement,
    Policy,
)
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.virtual_links import LinkRate
from tests.command import ROOT
from tests.engine import OPTIONS, configured
from tests.finemoe.offload.states import DECODE, HostCosts, asked, gate, routed

SHAPE = ModelShape(layers=2, experts=4, top_k=1, hidden_size=2)


def machine(*slots: int) -> Machine:
    """A load takes 4, an expert 3 a token on the host and 1 on its device."""
    return Machine(slots, 4.0, lambda tokens: 3.0 * tokens, lambda tokens: 1.0)


def chosen(policy: Any, need: Need, on: Machine) -> list[int]:
    """Return whom a policy has the host compute on a machine."""
    policy.set_machine(on)
    return list(policy.host_experts(need))


def test_systems_that_may_use_the_host_say_so_in_their_yaml() -> None:
    """Else what a testbed's host computes with would be no part of their runs' identity."""
    for system in OPTIONS:
        option: Any = OmegaConf.load(ROOT / "conf" / "system" / f"{system}.yaml")
        uses = configured(system, SHAPE).host_experts is not None
        assert option.get("uses_host", False) == uses, system


def fiddler() -> FiddlerPolicy:
    """Return one that saw expert 1 of layer 0 twice, 2 of layer 1 and 3 of layer 0 once."""
    policy = FiddlerPolicy(SHAPE)
    policy.on_gate(DECODE, gate(0, (0.1, 0.6, 0.2, 0.1), (0.3, 0.4, 0.2, 0.1)))
    policy.on_gate(DECODE, gate(0, (0.1, 0.2, 0.2, 0.5)))
    policy.on_gate(DECODE, gate(1, (0.1, 0.2, 0.6, 0.1)))
    policy.begin_serving()
    assert policy.placement.prediction == "none"
    return policy


def test_the_popular_stay_and_others_are_computed_where_it_is_sooner() -> None:
    policy = fiddler()
    # Three slots hold two residents, (0, 1) and (0, 3): these are loaded. Of the others one token
    # takes the host 3, two take it 6, and a copy and the device 5.
    need = Need(DECODE, 0, [1, 1, 2, 1], (), (0, 1, 2, 3))
    assert chosen(policy, need, machine(3)) == [0]
    keys = policy.eviction_keys(ExpertId(0, 2), True)
    ranked = (-keys).ravel().argsort(kind="stable").tolist()
    assert ranked[-2:] == [3, 1]


def test_each_device_keeps_its_own_most_popular() -> None:
    policy = fiddler()
    # Device 0 has experts 0 and 2 of each layer; of these (1, 2) was seen.
    need = Need(DECODE, 1, [1] * 4, (), (0, 1, 2, 3))
    assert chosen(policy, need, machine(2, 2)) == [0, 1, 3]
    # A single slot is all placeholder.
    assert chosen(fiddler(), need, machine(1, 1)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    # The link takes 4 for what takes the host 3: three sevenths are fetched. Of 4, the sides take 8
    # and 6, or 4 and 9.
    ("missing", "fetched"),
    [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3)],
)
def test_links_and_host_share_so_that_the_slower_is_quickest(missing: int, fetched: int) -> None:
    policy = FreeTokenPolicy(ModelShape(1, 16, 1, 1))
    on = Machine((4,), 4.0, lambda tokens: 3.0, lambda tokens: 1.0)
    need = Need(DECODE, 0, [1] * 16, (), tuple(range(missing)))
    assert len(chosen(policy, need, on)) == missing - fetched
    best = min(max(count * 4.0, (missing - count) * 3.0) for count in range(missing + 1))
    assert max(fetched * 4.0, (missing - fetched) * 3.0) == best


def test_the_most_recent_are_fetched_and_all_of_a_prefill() -> None:
    policy = FreeTokenPolicy(SHAPE)
    policy.on_outcome(LayerOutcome(DECODE, 0, (), (), (), (2,)))
    policy.on_outcome(LayerOutcome(DECODE, 0, (), (), (0,)))
    on = Machine((4,), 1.0, lambda tokens: 1.0, lambda tokens: 1.0)
    # Half of them: 0 and 2 were used, 0 last.
    need = Need(DECODE, 0, [1] * 4, (), (0, 1, 2, 3))
    assert chosen(policy, need, on) == [1, 3]
    assert chosen(policy, need._replace(missing=(0, 2)), on) == [2]
    prefill = Iteration(0, "prefill", (0,), (4,))
    assert chosen(policy, need._replace(iteration=prefill), on) == []


@pytest.mark.parametrize("kind", [HybriMoePolicy, HostPlannerPolicy])
def test_the_device_takes_from_the_front_and_the_host_from_the_back(kind: Any) -> None:
    policy = kind(SHAPE)
    # Expert 0 is resident, then come 1, 3, 2 by tokens. The host has 2 at 3, when the device would
    # have 1 at 5; the device has 1 at 5, when the host would have 3 at 9; the device has it at 9.
    need = Need(DECODE, 0, [9, 5, 1, 2], (0,), (1, 2, 3))
    assert chosen(policy, need, machine(4)) == [2]
    assert schedule([1.0], [(0, 1.0, 15.0), (0, 1.0, 6.0), (0, 1.0, 3.0)], 4.0) == (1, 9.0)
    # With a link each, the first two arrive at 4; the third would arrive at 8.
    assert schedule([1.0, 0.0], [(1, 1.0, 15.0), (0, 1.0, 6.0), (1, 1.0, 6.0)], 4.0) == (1, 6.0)


def test_what_a_link_copies_the_planner_does_not_have_the_host_compute() -> None:
    need = Need(DECODE, 0, [1, 1, 1], (), (0, 1, 2), arriving=(1,))
    assert chosen(HybriMoePolicy(SHAPE), need, machine(4)) == [1, 2]
    # The copy of 1 takes 2 more, so a load of 0 would end at 6 and its expert at 7. On the host 2
    # is done at 3 and 0 at 6.
    assert chosen(HostPlannerPolicy(SHAPE), need, machine(4)) == [0, 2]
    # A host that computes it twice before the rest of the copy is there has it all.
    strong = Machine((4,), 4.0, lambda tokens: 0.9, lambda tokens: 1.0)
    assert sorted(chosen(HostPlannerPolicy(SHAPE), need, strong)) == [0, 1, 2]


def test_scores_average_the_best_probabilities_and_the_lowest_of_the_fullest_layer_leaves() -> None:
    policy = HybriMoePolicy(SHAPE)
    policy.set_machine(machine(4))
    policy.set_gates(GateWeights(np.zeros((2, 4, 2), np.float32)))
    nothing = [[0, 0], [0, 0]]
    policy.on_gate(
        DECODE, gate(0, (0.5, 0.3, 0.125, 0.075), (0.25, 0.5, 0.2, 0.05), hidden=nothing)
    )
    policy.on_gate(DECODE, gate(0, (0.125, 0.125, 0.25, 0.5), hidden=nothing[:1]))
    # TopP keeps 2: first (0.375, 0.4, 0, 0), then (0, 0, 0.25, 0.5).
    expected = [0.09375, 0.1, 0.125, 0.25]
    assert -policy.eviction_keys(ExpertId(1, 0), True)[0] == pytest.approx(expected)
    for expert in (ExpertId(0, 1), ExpertId(0, 2), ExpertId(1, 0)):
        policy.on_load(expert)
    keys = policy.eviction_keys(ExpertId(1, 3), False)
    assert max((ExpertId(0, 1), ExpertId(0, 2), ExpertId(1, 0)), key=keys.__getitem__) == (0, 1)
    policy.on_evict(ExpertId(0, 1))
    # Two layers with one each: that of the incoming expert gives way.
    keys = policy.eviction_keys(ExpertId(1, 3), False)
    assert keys[1, 0] > keys[0, 2]


def test_what_would_shorten_a_later_layer_most_is_prefetched_first() -> None:
    policy = HybriMoePolicy(ModelShape(3, 4, 2, 2), ahead=1)
    weight = np.zeros((3, 4, 2), np.float32)
    weight[1] = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    policy.set_gates(GateWeights(weight))
    here = gate(0, (0.25,) * 4, hidden=[[2, 1]])
    policy.set_machine(machine(4))
    # Layer 1 wants 0 and 1 for a token each: the host has 1 at 3, the device 0 at 5. With either
    # of them there, the device has it at 1 and the host the other one at 3.
    assert asked(policy.on_gate(DECODE, here)) == {(1, 0): 2.0, (1, 1): 2.0}
    policy.on_load(ExpertId(1, 0))
    # Then the layer takes 3, and 2 with both.
    assert asked(policy.on_gate(DECODE, here)) == {(1, 1): 1.0}


class Scheduled(HybriMoePolicy):
    """Schedules, and predicts nothing."""

    placement = Placement()


class Loading(Scheduled):
    """The same cache, without a host."""

    host_experts = None  # type: ignore[assignment]


def seconds_of(policy: Policy, on: Machine, layers: tuple[tuple[int, ...], ...]) -> float:
    shape = ModelShape(len(layers), 6, 1, 1)
    zero = Line(0.0)
    costs = HostCosts(
        *(zero, zero, zero, Line(on.device(1)), Line(on.host(1))), parallel=len(on.slots) > 1
    )
    if policy.set_machine:
        policy.set_machine(on)
    residency = Residency(shape, MemoryPlan(on.slots, 8, 8), policy)
    replay = ReplayRuntime(policy, residency, costs, LinkRate(8 / on.load))
    return replay.forward(routed(shape, 0, layers))


@given(
    devices=st.integers(1, 3),
    activated=st.sets(st.integers(0, 5), min_size=1),
    load=st.integers(1, 20),
    host=st.integers(1, 20),
    device=st.integers(0, 5),
)
def test_the_choice_makes_no_layer_slower_than_loading_all(
    devices: int, activated: set[int], load: int, host: int, device: int
) -> None:
    """With latencies as told, and the same cache: the device's share is a part of what it did."""
    on = Machine((2,) * devices, load, lambda tokens: host, lambda tokens: device)
    shape, layer = ModelShape(1, 6, 1, 1), tuple(sorted(activated))
    shared = seconds_of(Scheduled(shape), on, (layer,))
    works = [(index % devices, float(device), float(host)) for index in layer]
    assert shared == pytest.approx(schedule([0.0] * devices, works, load)[1])
    assert shared <= seconds_of(Loading(shape), on, (layer,)) + 1e-9
