"""Belady and the oracle: what they keep, what they request, and that nobody has more hits."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.belady import BeladyPolicy
from baselines.on_demand import OnDemandPolicy
from baselines.oracle import OraclePolicy
from finemoe.costs import Line, LinearCosts
from finemoe.offload.bounds import critical_path, minimal_loads
from finemoe.offload.policy import (
    ExpertId,
    GateWeights,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
    Priorities,
    Routing,
)
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.virtual_links import LinkRate
from tests.engine import OPTIONS, configured, machine
from tests.finemoe.offload.states import DECODE, asked, asking, gate, routed

SHAPE = ModelShape(layers=2, experts=4, top_k=2, hidden_size=1)
EXPERT_BYTES, CHUNK_BYTES = 4, 1


class Guessing(OnDemandPolicy):
    """Prefetches at random, and evicts the least recently used."""

    placement = Placement("critical_path")

    def __init__(self, rng: random.Random) -> None:
        super().__init__(SHAPE)
        self._rng = rng

    def on_gate(self, iteration: Any, gate: Any) -> Priorities:
        return self._guess((gate.layer + 1) % SHAPE.layers)

    def end_iteration(self, iteration: Any) -> Priorities:
        return self._guess(0)

    def _guess(self, layer: int) -> Priorities:
        return asking(SHAPE, {(layer, self._rng.randrange(SHAPE.experts)): 1.0})


class Engine:
    """Replays routing with layers that take as long as some chunks, for prefetches to use."""

    def __init__(self, policy: Policy, slots: Sequence[int], chunks: int = 0) -> None:
        plan = MemoryPlan(tuple(slots), EXPERT_BYTES, CHUNK_BYTES)
        self.residency = Residency(SHAPE, plan, policy)
        self.outcomes: list[LayerOutcome] = []
        nothing, layer = Line(0.0), Line(float(chunks))
        costs = LinearCosts(nothing, layer, nothing, nothing)
        self.runtime = ReplayRuntime(policy, self.residency, costs, LinkRate(1.0))
        self.runtime.listeners.append(self.outcomes.append)

    def serve(self, routing: Routing, first: int = 0) -> list[LayerOutcome]:
        for number, layers in enumerate(routing, first):
            self.runtime.forward(routed(SHAPE, number, layers))
        self.residency.cache.check_integrity()
        assert self.residency.cache.peak_occupied <= sum(self.residency.cache.slots)
        return self.outcomes

    @property
    def loads(self) -> int:
        traffic = self.residency.traffic()
        return (traffic.on_demand + traffic.prefetched) // EXPERT_BYTES


def ranked(priorities: Any) -> list[tuple[int, int]]:
    requests = asked(priorities)
    return sorted(requests, key=lambda expert: -requests[expert])


def told(policy: BeladyPolicy, routing: Routing) -> BeladyPolicy:
    policy.begin_serving()
    policy.set_future_routing(routing)
    return policy


def layer_sets(widest: int) -> st.SearchStrategy[tuple[int, ...]]:
    chosen = st.sets(st.integers(0, SHAPE.experts - 1), min_size=1, max_size=widest)
    return chosen.map(lambda indices: tuple(sorted(indices)))


def routings(widest: int) -> st.SearchStrategy[Routing]:
    layers = st.lists(layer_sets(widest), min_size=SHAPE.layers, max_size=SHAPE.layers)
    return st.lists(layers, min_size=1, max_size=15)


ROUTING: Routing = [[(0, 1), (2,)], [(0,), (3,)], [(1,), (2,)]]


def test_a_repeat_goes_on_where_the_numbers_do() -> None:
    policy = told(BeladyPolicy(SHAPE), [*ROUTING, *ROUTING])
    engine = Engine(policy, (2,))
    assert len(engine.serve(ROUTING, first=3)) == 6
    assert sum(len(outcome.hits) for outcome in engine.outcomes) == 2
    assert np.isinf(policy.eviction_keys(ExpertId(0, 0), True)).all()


def test_routing_that_was_not_told_is_refused() -> None:
    policy = told(BeladyPolicy(SHAPE), ROUTING)
    with pytest.raises(ValueError, match=r"layer 0 of iteration 0 activated \(2,\), not \(0, 1\)"):
        Engine(policy, (2,)).serve([[(2,), (2,)]])
    with pytest.raises(ValueError, match="not None"):
        Engine(policy, (2,)).serve(ROUTING[:1], first=3)


def test_the_oracle_requests_what_is_needed_soonest_and_not_there() -> None:
    policy = told(OraclePolicy(SHAPE, lookahead=3), ROUTING)
    policy.on_load(ExpertId(0, 1))
    embeddings, spoken = np.zeros((1, 1), np.float32), gate(0, (0,) * 4, activated=(0, 1))
    assert ranked(policy.on_embeddings(DECODE, embeddings)) == [(0, 0), (1, 2)]
    policy.on_evict(ExpertId(0, 1))
    # Layer 1 is still to come; then comes layer 0 of the next iteration.
    assert ranked(policy.on_gate(DECODE, spoken)) == [(1, 2), (0, 0)]
    near = told(OraclePolicy(SHAPE, lookahead=2), ROUTING)
    assert ranked(near.on_embeddings(DECODE, embeddings)) == [(0, 0), (0, 1)]
    nearest = told(OraclePolicy(SHAPE, lookahead=1), ROUTING)
    assert ranked(nearest.on_gate(DECODE, spoken)) == [(1, 2)]


def test_the_oracle_keeps_what_is_needed_before_a_prefetch() -> None:
    policy = told(OraclePolicy(SHAPE), ROUTING)
    keys = policy.eviction_keys(ExpertId(1, 2), False)
    # Needed at step 1: what is needed later, or never again, may go.
    evictable = keys > keys[1, 2]
    assert evictable.tolist() == [[False, False, True, True], [True, True, False, True]]
    assert policy.placement.displaces_less


PLANS = st.sampled_from([(1,), (2,), (3,), (5,), (1, 1), (2, 3), (2, 1, 2)])


@settings(max_examples=50)
@given(routings(widest=1), PLANS)
def test_belady_loads_no_more_than_it_must(routing: Routing, slots: tuple[int, ...]) -> None:
    engine = Engine(told(BeladyPolicy(SHAPE), routing), slots)
    engine.serve(routing)
    assert engine.loads == sum(minimal_loads(routing, SHAPE, slots))


@pytest.mark.parametrize("system", [*OPTIONS, "guessing"])
@settings(max_examples=20)
@given(routing=routings(widest=4), slots=PLANS, chunks=st.integers(0, 9), guesses=st.randoms())
def test_no_system_loads_less_or_is_faster_than_the_bound(
    system: str, routing: Routing, slots: tuple[int, ...], chunks: int, guesses: random.Random
) -> None:
    policy = Guessing(guesses) if system == "guessing" else configured(system, SHAPE)
    if policy.set_gates:
        shape = (SHAPE.layers, SHAPE.experts, SHAPE.hidden_size)
        policy.set_gates(GateWeights(np.zeros(shape, np.float32)))
    if policy.set_machine:
        policy.set_machine(machine(slots))
    policy.host_experts = None  # it bounds those that load all
    policy.begin_serving()
    if policy.set_future_routing:
        policy.set_future_routing(routing)
    engine = Engine(policy, slots, chunks)
    engine.serve(routing)
    layer_s = [float(chunks)] * SHAPE.layers * len(routing)
    assert engine.loads >= sum(minimal_loads(routing, SHAPE, slots))
    path_s, *_ = critical_path(routing, SHAPE, slots, layer_s, float(EXPERT_BYTES))
    assert engine.runtime.now >= path_s
