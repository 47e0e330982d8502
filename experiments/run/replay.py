"""Simulated runs: a routing trace replayed in the virtual time of a testbed.

Nothing is computed, so nothing can be verified: `lossless` is not set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.config import budget_slots, build, check_room, full_size, load_store, values_of
from experiments.run.console import Console, slots_line
from experiments.run.protocol import Measurement, Reference, Setup
from experiments.run.routing import open_routing
from experiments.run.schedule import Request, Server, Step
from experiments.run.workloads import prompted
from finemoe.files import write_json
from finemoe.offload.bounds import Roofline
from finemoe.offload.policy import Gates, Machine, Policy
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.routed import RoutedIteration, joined
from finemoe.offload.runtime import CostModel
from finemoe.offload.timeline import Timeline
from finemoe.testbed import SimulatedTestbed
from finemoe.trace import Trace, TracedRequest, TraceError

Fetch = Callable[[int], TracedRequest]  # returns a traced request by its number


def traced_request(fetch: Fetch, request: Request) -> TracedRequest:
    """Return what a trace holds of a request; TraceError if its lengths are not those asked for."""
    traced = fetch(request.number)
    prompt, answer = len(traced.prompt), len(traced.steps)
    if answer < request.output_tokens or request.input_tokens not in (None, prompt):
        asked = f"{request.output_tokens} output tokens; lower workload.output_tokens"
        if request.input_tokens is not None:
            remedy = "set routing=null to record one for it"
            asked = f"{request.input_tokens} and {request.output_tokens}; {remedy}"
        holds = f"request {request.number} with {prompt} input and {answer} output tokens"
        raise TraceError(f"the trace holds {holds}, the workload asks for {asked}")
    return traced


@dataclass
class TracedSteps:
    """Shows what steps route, by a trace; only running requests are held in memory."""

    fetch: Fetch
    show: Callable[[RoutedIteration], object]
    leave: Callable[[int], None] = lambda request: None  # told of each request that is served
    _running: dict[int, TracedRequest] = field(default_factory=dict)

    now: ClassVar[float] = 0.0

    def forward(self, step: Step) -> None:
        if step.phase == "prefill":
            for request in step.requests:
                self._running[request.number] = traced_request(self.fetch, request)
        traced = [self._running[request.number] for request in step.requests]
        pairs = list(zip(traced, step.generated, strict=True))
        steps = [one.steps[made] for one, made in pairs]
        contexts = [one.steps[0].tokens + made for one, made in pairs]
        self.show(joined(step.number, [one.number for one in traced], steps, contexts))

    def end_request(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        self.leave(request.number)
        traced = self._running.pop(request.number)
        return traced.prompt, traced.output[: request.output_tokens]

    def wait(self, until: float) -> None:
        pass

    def drain(self) -> None:
        pass


class ReplayBackend(TracedSteps):
    """Replays steps in the virtual time of a runtime."""

    def __init__(self, fetch: Fetch, runtime: ReplayRuntime) -> None:
        super().__init__(fetch, runtime.forward, runtime.end_request)
        self.runtime = runtime

    @property
    def now(self) -> float:  # type: ignore[override]
        return self.runtime.now

    def wait(self, until: float) -> None:
        self.runtime.wait_until(until)

    def drain(self) -> None:
        self.runtime.drain()

    def measuring(self, measurement: Measurement) -> AbstractContextManager[None]:
        return measurement.of(self.runtime)


@dataclass
class ReplaySetup(Setup):
    """A trace, and the costs of serving it on a simulated testbed."""

    testbed: SimulatedTestbed
    policy: Policy
    trace: Trace
    costs: CostModel
    plan: MemoryPlan
    budget_bytes: int

    @property
    def machine(self) -> Machine:
        """What a policy is told that may have the host compute."""
        rate, costs = self.testbed.rate, self.costs
        load = self.plan.expert_bytes / rate.bytes_per_second + rate.latency
        return Machine(self.slots, load, cache(costs.host), cache(costs.expert))

    def description(self) -> tuple[str, ...]:
        origin, testbed = self.trace.header.provenance, self.testbed
        return (
            f"{self.cfg.model.name} (routing of {origin.get('weights', 'foreign')} weights, "
            f"simulated) on {testbed.name}, {testbed.devices} device(s)",
            slots_line(self.shape, self.slots),
            f"routing from {self.trace.path}: {origin.get('dataset', 'of others')}",
        )

    @contextmanager
    def learning(self, policy: Policy) -> Iterator[tuple[TracedSteps, str]]:
        def teach(routed: RoutedIteration) -> None:
            hidden = routed.hidden_states if policy.placement.hidden_states else None
            gates = Gates(routed.probabilities, routed.activated, hidden)
            assert policy.learn
            policy.learn(routed.iteration, routed.embeddings, gates)

        backend = TracedSteps(self.trace.request, teach, policy.end_request)
        yield backend, "replayed with everything resident"

    @contextmanager
    def serving(self, policy: Policy | None, timeline: Timeline | None) -> Iterator[ReplayBackend]:
        """Yield a backend that starts at time 0 with an empty cache, or a full one if all fit."""
        policy = policy or self.policy
        residency = Residency(self.shape, self.plan, policy, self.machine)
        if residency.holds_everything:
            residency.preload()
        runtime = ReplayRuntime(policy, residency, self.costs, self.testbed.rate, timeline)
        yield ReplayBackend(self.trace.request, runtime)

    def reference(self, console: Console) -> Reference | None:
        return self.unoffloaded() if self.policy.set_future_routing else None

    def bound(self, reference: Reference | None) -> Roofline | None:
        """Return the least time, which is kept beside a kept trace for every other system."""
        if not self.settings.fixed:
            return None
        model = {**values_of(self.cfg.model), "prefetch_distance": None}
        of = [self.slots, model, *(values_of(self.cfg[name]) for name in ("testbed", "workload"))]
        digest = hashlib.sha256(json.dumps([self.trace.path.name, *of]).encode()).hexdigest()[:16]
        path = self.trace.path.parent / "bounds" / f"{digest}.json"
        with suppress(OSError, ValueError, TypeError):
            return Roofline(**json.loads(path.read_text()))
        limit = super().bound(reference or self.unoffloaded())
        if limit is not None and not self.cfg.routing:
            write_json(path, asdict(limit))
        return limit

    def unoffloaded(self) -> Reference:
        """Return what warm-up and measured requests route, and the seconds of compute alone."""
        routing, compute_s = list[list[tuple[int, ...]]](), 0.0

        def note(routed: RoutedIteration) -> None:
            nonlocal compute_s
            routing.append(routed.activated)
            compute_s += compute_seconds(self.costs, routed, len(self.slots))

        server, schedule = Server(TracedSteps(self.trace.request, note)), self.settings.schedule
        list(server.serve(schedule(self.workload.warmup)))
        measured_from, compute_s = server.iterations, 0.0
        list(server.serve(schedule(self.workload.measured)))
        return Reference(routing, measured_from, compute_s)

    def link_seconds(self, loads: Sequence[int]) -> float:
        expert_bytes, rate = self.plan.expert_bytes, self.testbed.rate
        own = max(loads) * (expert_bytes / rate.bytes_per_second + rate.latency)
        return max(own, sum(loads) * expert_bytes / rate.shared_bytes_per_second)

    def facts(self, measurement: Measurement) -> dict[str, Any]:
        origin = self.trace.header.provenance
        routing = f"a foreign trace, {origin.get('foreign')}"
        if "model" in origin:
            routing = f"a trace of {origin['model']} with weights {origin['weights']}"
        return {
            "routing": routing,
            "memory_budget_gb": self.budget_bytes / 1e9,
            "expert_bytes": self.plan.expert_bytes,
            "stored_expert_bytes": self.plan.expert_bytes,
            "positions": origin.get("positions"),
            "cast": origin.get("cast"),
            "prediction_costs": self.costs.prediction_source,
            "summary": {
                "slot_budget_bytes": self.budget_bytes,
                "dense_bytes": full_size(self.cfg.model).dense_bytes,
            },
        }


@contextmanager
def prepare(cfg: DictConfig, testbed: SimulatedTestbed, console: Console) -> Iterator[ReplaySetup]:
    """Open the trace, build policy and costs; raise UserError or TraceError for what cannot be."""
    settings = build(cfg.workload)
    if settings.repeats > 1:  # Another time would be the same.
        settings = replace(settings, repeats=1)
    with open_routing(cfg, console) as trace:
        shape = trace.header.shape
        load = prompted(settings.traced(trace, cfg.seed), trace)
        policy: Policy = build(cfg.system, shape=shape)
        placement = policy.placement
        contents = ("logits", "embeddings") if placement.prediction != "none" else ()
        hidden = ("hidden_states",) if placement.hidden_states else ()
        trace.require((*contents, *hidden), gates=placement.hidden_states)
        if policy.set_gates and trace.header.gates is not None:
            policy.set_gates(trace.header.gates)
        full = full_size(cfg.model).expert_bytes
        budget, slots = budget_slots(cfg, policy, full, shape, testbed.devices)
        check_room(cfg, testbed, slots)
        load_store(cfg, policy)
        predicts = placement.prediction != "none" and not policy.set_future_routing
        costs = testbed.costs(cfg.model, cfg.system, predicts)
        if policy.host_experts:
            try:
                costs.host(1)
            except NotImplementedError as error:
                cause = f"testbed {testbed.name}: {error}, which system={cfg.system.label} asks for"
                raise UserError(f"{cause}; give testbed.host or choose another testbed") from error
        plan = MemoryPlan(slots, full, testbed.chunk_bytes, bool(cfg.protect))
        yield ReplaySetup(
            cfg, testbed, settings, load, policy, shape, slots, trace, costs, plan, budget
        )


def compute_seconds(costs: CostModel, routed: RoutedIteration, devices: int) -> float:
    """Return what an iteration takes with every expert resident."""
    whole = costs.iteration(routed.iteration.tokens, routed.contexts)
    layers, experts = routed.counts.shape
    total = whole.start + layers * whole.dense + whole.finish
    for layer, activated in enumerate(routed.activated):
        busy = [0.0] * (devices if costs.parallel else 1)
        for index in activated:
            device = (layer * experts + index) % devices
            seconds = costs.expert(int(routed.counts[layer, index]))
            busy[device % len(busy)] += seconds + (costs.hop if device else 0.0)
        total += max(busy)
    return total
