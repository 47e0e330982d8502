"""Rule 4: same policy, same trace, same transfer order => the same hits, late and misses, live and
in replay, expert by expert.

The order is forced by making links fast against everything else. Live, whatever the model's thread
does ends only when searcher and links have nothing left to do; in virtual time, whatever it does
takes a million times as long as a copy.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.on_demand import OnDemandPolicy
from experiments.run.replay import ReplayBackend
from experiments.run.schedule import FixedBatches, Request, Server
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.costs import Line, LinearCosts
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome, ModelShape, Policy, Routing
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.runtime import PredictionCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.recorder import Recorder
from finemoe.trace import TracedRequest
from tests.engine import (
    OPTIONS,
    breaches,
    configured,
    emulated,
    offloaded,
    prepared,
    requests,
    serve,
)

DEVICES: dict[int, list[tuple[int, ...]]] = {
    1: [(2,), (5,), (9,), (12,)],
    3: [(1, 1, 1), (3, 2, 2), (4, 4, 4)],
}
COUPLED = ("promoe", "mixtral_offload")
"""Their eviction counts a layer's residents on all devices, and no order is forced between links:
on several devices only budgets that leave no choice, or need none, are compared."""
OUTPUT = 5
SLOW, COPY_RATE = 1.0, 1e12


@dataclass
class Lockstep:
    """A live timeline: a span on the model's thread ends when all that is asked for is done."""

    runtime: LiveRuntime | None = None
    thread: int = field(default_factory=threading.get_ident)

    def span(self, track: str, name: str, start: float, end: float) -> None:
        if threading.get_ident() == self.thread:
            self.settle()

    def settle(self, *_: object) -> None:
        """Wait until nothing is left to search or to copy."""
        assert self.runtime is not None
        self.runtime.drain()
        changed = self.runtime._changed
        with changed:
            while not self.runtime.residency.settled():
                self.runtime._raise_failure()
                changed.wait()


@pytest.fixture(scope="module")
def model() -> OffloadedModel:
    return offloaded()


def batches(size: int) -> list[list[Request]]:
    return [requests(size, 4, first, OUTPUT) for first in (0, 10, 20)]


@cache
def recorded(model: OffloadedModel, size: int) -> dict[int, TracedRequest]:
    """Return what every request routes, by its number."""
    with (
        resident_runtime(model, OnDemandPolicy(model.shape)) as runtime,
        Recorder(model) as recorder,
    ):
        begin = lambda step: recorder.begin(step.iteration)  # noqa: E731
        served = serve(runtime, *batches(size), before=begin)
        return {
            one.request.number: recorder.finish(one.request.number, one.request.prompt, one.tokens)
            for one in served
        }


def future(trace: dict[int, TracedRequest], size: int) -> Routing:
    """Return the activated experts of every layer, iteration by iteration."""
    routing = []
    for batch in batches(size):
        for step in range(OUTPUT):
            counts = np.sum([trace[request.number].steps[step].counts for request in batch], axis=0)
            routing.append([tuple(np.flatnonzero(row).tolist()) for row in counts])
    return routing


def live(
    model: OffloadedModel, policy: Policy, slots: tuple[int, ...], size: int, protect: bool
) -> tuple[list[LayerOutcome], MemoryPlan]:
    """Serve for real, in lockstep; return how experts were found, and the plan."""
    testbed = emulated(len(slots), link_gb_s=100.0)
    lockstep, found = Lockstep(), list[LayerOutcome]()
    stored = model.store.layout.nbytes
    runtime = offloading_runtime(model, policy, testbed, slots, stored, lockstep, protect)
    # On-demand loads are done before the policy is asked, as its answer takes long in the replay.
    runtime.listeners += [found.append, lockstep.settle]
    broken = breaches(runtime.residency)
    lockstep.runtime = runtime
    hooks = [gate.register_forward_pre_hook(lockstep.settle) for gate in model.gates]
    with runtime:
        serve(runtime, *batches(size))
    for hook in hooks:
        hook.remove()
    assert not (protect and broken)
    return found, runtime.residency.plan


def replayed(
    trace: dict[int, TracedRequest],
    shape: ModelShape,
    policy: Policy,
    plan: MemoryPlan,
    size: int,
    rate: float = COPY_RATE,
) -> list[LayerOutcome]:
    """Replay the trace, with links that are fast against everything else if nothing is said."""
    line = Line(SLOW)
    prediction = PredictionCosts(embeddings=SLOW, gate=SLOW, update=SLOW)
    if policy.placement.prediction == "background":
        # The searcher is done before anything else goes on, as `drain` makes it live.
        prediction = PredictionCosts()
    costs = LinearCosts(line, line, line, line, collect=SLOW, prediction=prediction)
    residency = Residency(shape, plan, policy)
    if residency.holds_everything:
        residency.preload()
    broken = breaches(residency)
    runtime = ReplayRuntime(policy, residency, costs, LinkRate(rate))
    found: list[LayerOutcome] = []
    runtime.listeners.append(found.append)
    server = Server(ReplayBackend(trace.__getitem__, runtime=runtime))
    for batch in batches(size):
        list(server.serve(FixedBatches(batch, size)))
    assert not (plan.protect and broken)
    return found


def kinds(outcomes: Sequence[LayerOutcome]) -> dict[str, int]:
    return {
        kind: sum(len(getattr(outcome, kind)) for outcome in outcomes)
        for kind in ("hits", "late", "misses")
    }


@pytest.mark.parametrize(
    ("system", "options", "protect"),
    [
        *((system, {}, protect) for system in OPTIONS for protect in (False, True)),
        ("finemoe", {"aggregation": "demo"}, True),
        ("mixtral_offload", {"prefetching": "asynchronous", "experts": 1}, False),
        ("promoe", {"prefill": "code"}, True),
        ("moe_infinity", {"prefetching": "awaited"}, True),
        ("moe_infinity", {"prefetching": "awaited_next_layer"}, False),
    ],
)
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("size", [1, 3])
def test_live_and_replay_find_every_expert_alike(
    model: OffloadedModel,
    system: str,
    options: dict[str, Any],
    devices: int,
    size: int,
    protect: bool,
) -> None:
    trace = recorded(model, size)
    policy = prepared(configured(system, model.shape, **options), model)
    if policy.set_future_routing:
        policy.set_future_routing(future(trace, size))
    seen = []
    budgets = DEVICES[devices]
    if devices > 1 and system in COUPLED:
        budgets = [budgets[0], budgets[-1]]
    for slots in budgets:
        found, plan = live(model, copy.deepcopy(policy), slots, size, protect)
        again = replayed(trace, model.shape, copy.deepcopy(policy), plan, size)
        assert found == again, (slots, kinds(found), kinds(again))
        # Each layer is asked for its whole set, every expert once.
        assert [one.activated for one in found] == list(chain(*future(trace, size)))
        seen.append(kinds(found))
    # The comparison is of something: budgets differ, and the smallest one misses or is late.
    assert seen[0]["hits"] < seen[-1]["hits"]
    assert seen[0]["late"] + seen[0]["misses"] > 0


@pytest.mark.parametrize("system", OPTIONS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_protected_leaves_for_no_prefetch_before_its_layers_gate_spoke(
    model: OffloadedModel, system: str, data: st.DataObject
) -> None:
    """`replayed` asserts it; links may be of any speed."""
    size = data.draw(st.sampled_from([1, 2]))
    slots = data.draw(st.sampled_from([(2,), (5,), (9,), (3, 2, 2), (1, 1)]))
    rate = data.draw(st.sampled_from([1e2, 1e4, 1e5, COPY_RATE]))
    options = {name: data.draw(st.sampled_from(values)) for name, values in OPTIONS[system].items()}
    trace = recorded(model, size)
    policy = prepared(configured(system, model.shape, **options), model)
    if policy.set_future_routing:
        policy.set_future_routing(future(trace, size))
    stored = model.store.layout.nbytes
    plan = MemoryPlan(slots, stored, stored // 3, protect=True)
    replayed(trace, model.shape, policy, plan, size, rate)
