"""Belady and the oracle: what they keep, what they request, and that nobody has more hits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.belady import BeladyPolicy
from baselines.lfu import LfuPolicy
from baselines.on_demand import OnDemandPolicy
from baselines.oracle import OraclePolicy
from finemoe.offload.bounds import minimal_loads
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
    Priorities,
    Routing,
)
from finemoe.offload.residency import MemoryPlan, Residency
from tests.finemoe.offload.states import asked, asking

SHAPE = ModelShape(layers=2, experts=4, top_k=2, hidden_size=1)
EXPERT_BYTES, CHUNK_BYTES = 4, 1


class Guessing(OnDemandPolicy):
    """Prefetches at random, and evicts the least recently used."""

    placement = Placement("critical_path")

    def __init__(self, shape: ModelShape, rng: random.Random) -> None:
        super().__init__(shape)
        self.shape = shape
        self._rng = rng

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities:
        return self._guess((gate.layer + 1) % self.shape.layers)

    def end_iteration(self, iteration: Iteration) -> Priorities:
        return self._guess(0)

    def _guess(self, layer: int) -> Priorities:
        return asking(self.shape, {(layer, self._rng.randrange(self.shape.experts)): 1.0})


class Engine:
    """Serves routing with loads that take no time; prefetches get some chunks between gates.

    Hits leave their pins before missing experts take slots if `turns` is set, and after otherwise:
    a live runtime may do either, as its threads run.
    """

    def __init__(
        self,
        policy: Policy,
        slots: Sequence[int],
        chunks: int = 0,
        turns: bool = False,
        shape: ModelShape = SHAPE,
    ) -> None:
        self.policy = policy
        plan = MemoryPlan(tuple(slots), EXPERT_BYTES, CHUNK_BYTES)
        self.residency = Residency(shape, plan, policy)
        self.outcomes: list[LayerOutcome] = []
        self._chunks = chunks
        self._turns = turns
        self._predicts = policy.placement.prediction != "none"

    def serve(self, routing: Routing, first: int = 0) -> list[LayerOutcome]:
        for number, layers in enumerate(routing, first):
            iteration = Iteration(number, "decode", (0,), (1,))
            self.residency.begin_iteration(iteration)
            if self._predicts:
                self._request(number, self.policy.on_embeddings(iteration, rows(1)))
            for layer, activated in enumerate(layers):
                self._prefetch()
                self._layer(iteration, layer, activated)
            if self._predicts:
                self._request(number + 1, self.policy.end_iteration(iteration))
        self.residency.cache.check_integrity()
        return self.outcomes

    @property
    def hits(self) -> int:
        return sum(len(outcome.hits) for outcome in self.outcomes)

    @property
    def loads(self) -> int:
        traffic = self.residency.traffic()
        return (traffic.on_demand + traffic.prefetched) // EXPERT_BYTES

    def _layer(self, iteration: Iteration, layer: int, activated: tuple[int, ...]) -> None:
        outcome = self.residency.gate(iteration, layer, activated)
        self.outcomes.append(outcome)
        if self._predicts:
            gate = Gate(layer, rows(self.residency.shape.experts), activated, None)
            self._request(iteration.number, self.policy.on_gate(iteration, gate))
        done = [layer * self.residency.shape.experts + index for index in outcome.hits]
        waiting = len(outcome.late) + len(outcome.misses)
        if self._turns:
            self._release(done)
        while waiting:
            arrived = self._arrivals()
            waiting -= len(arrived)
            self._release(done + arrived)
            done = []
        self._release(done)

    def _arrivals(self) -> list[int]:
        """Copy until an expert that is waited for is there, or no link can go on."""
        for device in range(len(self.residency.queues)):
            while (chunk := self.residency.next_chunk(device)) is not None:
                loaded = self.residency.chunk_done(device, chunk)
                if loaded and self.residency.cache.is_pinned(chunk.flat):
                    return [chunk.flat]
                if not chunk.urgent:
                    break
        return []

    def _release(self, experts: list[int]) -> None:
        for flat in experts:
            self.residency.release(flat)
        experts.clear()

    def _prefetch(self) -> None:
        for device in range(len(self.residency.queues)):
            for _ in range(self._chunks):
                chunk = self.residency.next_chunk(device)
                if chunk is None:
                    break
                self.residency.chunk_done(device, chunk)

    def _request(self, number: int, priorities: Priorities | None) -> None:
        self.residency.prefetch(number, priorities, self.residency.policy.on_gate)


def rows(width: int) -> FloatArray:
    return np.zeros((1, width), dtype=np.float32)


def ranked(priorities: Priorities | None) -> list[tuple[int, int]]:
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


def test_the_keys_are_the_steps_of_the_next_uses() -> None:
    policy = told(BeladyPolicy(SHAPE), ROUTING)
    never = np.inf
    keys = policy.eviction_keys(ExpertId(0, 0), True)
    assert keys.tolist() == [[0, 0, never, never], [never, never, 1, 3]]
    Engine(policy, (8,)).serve(ROUTING[:1])
    keys = policy.eviction_keys(ExpertId(0, 0), True)
    assert keys.tolist() == [[2, 4, never, never], [never, never, 5, 3]]


def test_a_repeat_goes_on_where_the_numbers_do() -> None:
    policy = told(BeladyPolicy(SHAPE), [*ROUTING, *ROUTING])
    engine = Engine(policy, (2,))
    assert len(engine.serve(ROUTING, first=3)) == 6
    assert engine.hits == 2
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
    requests = policy.on_embeddings(Iteration(0, "decode", (0,), (1,)), rows(1))
    assert ranked(requests) == [(0, 0), (1, 2)]
    policy.on_evict(ExpertId(0, 1))
    requests = policy.on_gate(Iteration(0, "decode", (0,), (1,)), Gate(0, rows(4), (0, 1), None))
    assert ranked(requests) == [(0, 0), (0, 1), (1, 2)]
    near = told(OraclePolicy(SHAPE, lookahead=2), ROUTING)
    assert ranked(near.on_embeddings(Iteration(0, "decode", (0,), (1,)), rows(1))) == [
        (0, 0),
        (0, 1),
    ]


def test_the_oracle_requests_one_iteration_at_a_time() -> None:
    policy = told(OraclePolicy(SHAPE), ROUTING)
    now = Iteration(0, "decode", (0,), (1,))
    assert ranked(policy.on_embeddings(now, rows(1))) == [(0, 0), (0, 1), (1, 2)]
    policy.on_outcome(LayerOutcome(now, 0, (0, 1), (), ()))
    assert ranked(policy.on_gate(now, Gate(0, rows(4), (0, 1), None))) == [(1, 2)]
    policy.on_outcome(LayerOutcome(now, 1, (2,), (), ()))
    assert ranked(policy.end_iteration(now)) == [(0, 0), (1, 3)]


def test_the_oracle_keeps_what_is_needed_before_a_prefetch() -> None:
    policy = told(OraclePolicy(SHAPE), ROUTING)
    evictable = policy.eviction_keys(ExpertId(1, 2), False) > -np.inf
    # Needed at step 1: what is needed later, or never again, may go.
    assert evictable.tolist() == [[False, False, True, True], [True, True, False, True]]


def test_the_oracle_gives_a_demanded_expert_the_slot_that_is_needed_last() -> None:
    policy = told(OraclePolicy(SHAPE), [[(0,), (1, 2)], [(0,), (2,)]])
    engine = Engine(policy, (2,))
    # The slots hold (0, 0) and (1, 1), which nobody needs again, when (1, 2) is demanded.
    assert [o.hits for o in engine.serve([[(0,), (1, 2)]])] == [(), ()]
    residents = [flat for flat in range(8) if engine.residency.cache.is_resident(flat)]
    assert residents == [0, 6]


PLANS = st.sampled_from([(1,), (2,), (3,), (5,), (1, 1), (2, 3), (2, 1, 2)])


@settings(max_examples=100, deadline=None)
@given(routings(widest=4), PLANS, st.booleans())
def test_no_system_without_prefetches_has_more_hits_than_belady(
    routing: Routing, slots: tuple[int, ...], turns: bool
) -> None:
    belady = Engine(told(BeladyPolicy(SHAPE), routing), slots, turns=turns)
    belady.serve(routing)
    for policy in (OnDemandPolicy(SHAPE), LfuPolicy(SHAPE)):
        other = Engine(policy, slots, turns=turns)
        other.serve(routing)
        assert belady.hits >= other.hits


@settings(max_examples=100, deadline=None)
@given(routings(widest=1), PLANS)
def test_belady_loads_no_more_than_it_must_where_a_layer_runs_one_expert(
    routing: Routing, slots: tuple[int, ...]
) -> None:
    engine = Engine(told(BeladyPolicy(SHAPE), routing), slots)
    engine.serve(routing)
    assert engine.loads == sum(minimal_loads(routing, SHAPE, slots))


@settings(max_examples=100, deadline=None)
@given(routings(widest=4), PLANS, st.booleans(), st.integers(0, 9), st.randoms())
def test_no_policy_loads_less_than_the_bound(
    routing: Routing, slots: tuple[int, ...], turns: bool, chunks: int, rng: random.Random
) -> None:
    least = sum(minimal_loads(routing, SHAPE, slots))
    for policy in (
        OnDemandPolicy(SHAPE),
        LfuPolicy(SHAPE),
        Guessing(SHAPE, rng),
        told(BeladyPolicy(SHAPE), routing),
        told(OraclePolicy(SHAPE), routing),
    ):
        engine = Engine(policy, slots, chunks, turns)
        engine.serve(routing)
        assert engine.loads >= least


@pytest.mark.parametrize("slots", [(12,), (40,), (9, 9)])
@pytest.mark.parametrize("chunks", [1, 4, 12])
def test_no_policy_has_more_hits_than_the_oracle(slots: tuple[int, ...], chunks: int) -> None:
    shape = ModelShape(layers=8, experts=8, top_k=2, hidden_size=1)
    rng = random.Random(0)
    routing = [[skewed(rng, shape) for _ in range(shape.layers)] for _ in range(20)]
    oracle = Engine(told(OraclePolicy(shape), routing), slots, chunks, shape=shape)
    oracle.serve(routing)
    for policy in (
        OnDemandPolicy(shape),
        LfuPolicy(shape),
        Guessing(shape, rng),
        told(BeladyPolicy(shape), routing),
    ):
        other = Engine(policy, slots, chunks, shape=shape)
        other.serve(routing)
        assert oracle.hits >= other.hits


def skewed(rng: random.Random, shape: ModelShape) -> tuple[int, ...]:
    """Return K experts of a layer, low indices more often."""
    chosen: set[int] = set()
    while len(chosen) < shape.top_k:
        chosen.add(min(int(rng.expovariate(0.4)), shape.experts - 1))
    return tuple(sorted(chosen))
