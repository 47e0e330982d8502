"""Rule 4: same policy, same trace, same transfer order => the same hits, late and misses, live and
in replay, expert by expert.

The order is forced by making links fast against everything else. Live, whatever the model's thread
does ends only when searcher and links have nothing left to do; in virtual time, whatever it does
takes a million times as long as a copy.
"""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import pytest

from experiments.run.replay import ReplayBackend
from experiments.run.schedule import FixedBatches, Request, Server
from finemoe.costs import Line
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome, ModelShape, Policy, Routing
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.runtime import PredictionCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.trace import TracedRequest
from tests import engine
from tests.engine import OPTIONS, offloaded, requests, serve
from tests.finemoe.offload.states import HostCosts

DEVICES: dict[int, list[tuple[int, ...]]] = {
    1: [(2,), (5,), (12,)],
    3: [(1, 1, 1), (3, 2, 2), (4, 4, 4)],
}
COUPLED = ("promoe", "mixtral_offload", "hybrimoe")
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
def traced(model: OffloadedModel, size: int) -> tuple[dict[int, TracedRequest], Routing]:
    return engine.recorded(model, *batches(size))


def live(
    model: OffloadedModel, policy: Policy, slots: tuple[int, ...], size: int, protect: bool
) -> tuple[list[LayerOutcome], MemoryPlan]:
    """Serve for real, in lockstep; return how experts were found, and the plan."""
    lockstep, found = Lockstep(), list[LayerOutcome]()
    runtime = engine.offloading(model, policy, slots, lockstep, protect, link_gb_s=100.0)
    # On-demand loads are done before the policy is asked, as its answer takes long in the replay.
    runtime.listeners += [found.append, lockstep.settle]
    lockstep.runtime = runtime
    hooks = [gate.register_forward_pre_hook(lockstep.settle) for gate in model.gates]
    with runtime:
        serve(runtime, *batches(size))
    for hook in hooks:
        hook.remove()
    return found, runtime.residency.plan


def replayed(
    trace: dict[int, TracedRequest], shape: ModelShape, policy: Policy, plan: MemoryPlan, size: int
) -> list[LayerOutcome]:
    """Replay the trace, with links that are fast against everything else."""
    line = Line(SLOW)
    prediction = PredictionCosts(embeddings=SLOW, gate=SLOW, update=SLOW)
    if policy.placement.prediction == "background":
        # The searcher is done before anything else goes on, as `drain` makes it live.
        prediction = PredictionCosts()
    costs = HostCosts(line, line, line, line, line, collect=SLOW, prediction=prediction)
    if policy.set_machine:
        policy.set_machine(engine.machine(plan.slots))
    residency = Residency(shape, plan, policy)
    if residency.holds_everything:
        residency.preload()
    runtime = ReplayRuntime(policy, residency, costs, LinkRate(COPY_RATE))
    found: list[LayerOutcome] = []
    runtime.listeners.append(found.append)
    server = Server(ReplayBackend(trace.__getitem__, runtime=runtime))
    for batch in batches(size):
        list(server.serve(FixedBatches(batch, size)))
    return found


def kinds(outcomes: Sequence[LayerOutcome]) -> dict[str, int]:
    return {
        kind: sum(len(getattr(outcome, kind)) for outcome in outcomes)
        for kind in ("hits", "late", "misses", "host")
    }


@pytest.mark.parametrize(
    ("system", "options"),
    [
        *((system, {}) for system in OPTIONS),
        ("finemoe", {"aggregation": "demo"}),
        ("mixtral_offload", {"prefetching": "asynchronous", "experts": 1}),
        ("promoe", {"prefill": "code"}),
        ("moe_infinity", {"prefetching": "awaited"}),
        ("moe_infinity", {"prefetching": "awaited_next_layer"}),
    ],
)
@pytest.mark.parametrize(
    ("devices", "size", "protect"), [(1, 1, False), (1, 3, True), (3, 1, True), (3, 3, False)]
)
def test_live_and_replay_find_every_expert_alike(
    model: OffloadedModel,
    system: str,
    options: dict[str, Any],
    devices: int,
    size: int,
    protect: bool,
) -> None:
    trace, routing = traced(model, size)
    policy = engine.prepared(engine.configured(system, model.shape, **options), model)
    if policy.set_future_routing:
        policy.set_future_routing(routing)
    seen = []
    budgets = DEVICES[devices]
    if devices > 1 and system in COUPLED:
        budgets = [budgets[0], budgets[-1]]
    for slots in budgets:
        found, plan = live(model, copy.deepcopy(policy), slots, size, protect)
        again = replayed(trace, model.shape, copy.deepcopy(policy), plan, size)
        assert found == again, (slots, kinds(found), kinds(again))
        # Each layer is asked for its whole set, every expert once, wherever it is computed.
        assert [one.activated for one in found] == list(chain(*routing))
        seen.append(kinds(found))
    # The comparison is of something: budgets differ, and the smallest one misses or is late.
    assert seen[0]["hits"] < seen[-1]["hits"]
    assert seen[0]["late"] + seen[0]["misses"] + seen[0]["host"] > 0
    assert (seen[0]["host"] > 0) == (policy.host_experts is not None)
