"""Simulated runs: a routing trace replayed in virtual time; nothing is computed or verified."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

from omegaconf import DictConfig

from experiments.errors import refusing
from experiments.run.config import build, build_policy, full_size, values_of
from experiments.run.console import Console, slots_line
from experiments.run.protocol import Measurement, Reference, Setup
from experiments.run.routing import open_routing, traced_request
from experiments.run.schedule import Request, Server, Step
from finemoe.files import write_json
from finemoe.offload.bounds import Roofline
from finemoe.offload.policy import Gates, Iteration, Machine, Policy
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.routed import RoutedIteration, joined
from finemoe.offload.runtime import CostModel
from finemoe.offload.timeline import Timeline
from finemoe.testbed import SimulatedTestbed
from finemoe.trace import Trace, TracedRequest


@dataclass
class ReplayBackend:
    """Gives a runtime what a trace routes; only running requests are held in memory."""

    fetch: Callable[[int], TracedRequest]  # returns a traced request by its number
    runtime: Any  # a ReplayRuntime, or a Listener
    _running: dict[int, TracedRequest] = field(default_factory=dict)

    @property
    def now(self) -> float:
        return self.runtime.now

    def forward(self, step: Step) -> None:
        if step.phase == "prefill":
            for request in step.requests:
                self._running[request.number] = traced_request(self.fetch, request)
        traced = [self._running[request.number] for request in step.requests]
        pairs = list(zip(traced, step.generated, strict=True))
        steps = [one.steps[made] for one, made in pairs]
        contexts = [one.steps[0].tokens + made for one, made in pairs]
        self.runtime.forward(joined(step.number, [one.number for one in traced], steps, contexts))

    def end_request(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        self.runtime.end_request(request.number)
        traced = self._running.pop(request.number)
        return traced.prompt, traced.output[: request.output_tokens]

    def wait(self, until: float) -> None:
        self.runtime.wait_until(until)

    def drain(self) -> None:
        self.runtime.drain()


@dataclass(frozen=True)
class Listener:
    """Stands for a runtime where fixed batches take no time and only their routing matters."""

    forward: Callable[[RoutedIteration], object]
    end_request: Callable[[int], object] = lambda request: None
    now: ClassVar[float] = 0.0

    def drain(self) -> None:
        """Nothing is under way."""


@dataclass
class ReplaySetup(Setup):
    """A trace, and the costs of serving it on a simulated testbed."""

    testbed: SimulatedTestbed
    policy: Policy
    trace: Trace
    costs: CostModel
    plan: MemoryPlan

    def description(self) -> tuple[str, ...]:
        testbed, weights = self.testbed, self.trace.header.provenance.get("weights", "foreign")
        return (
            f"{self.cfg.model.name} (routing of {weights} weights, simulated) on {testbed.name}, "
            f"{testbed.devices} device(s)",
            slots_line(self.shape, self.slots),
            f"routing from {self.trace.path}",
        )

    @contextmanager
    def learning(self, policy: Policy) -> Iterator[tuple[ReplayBackend, str]]:
        def teach(routed: RoutedIteration) -> None:
            hidden = routed.hidden_states if policy.placement.hidden_states else None
            gates = Gates(routed.probabilities, routed.activated, hidden)
            assert policy.learn
            policy.learn(routed.iteration, routed.embeddings, gates)

        backend = ReplayBackend(self.trace.request, Listener(teach, policy.end_request))
        yield backend, "replayed with everything resident"

    @contextmanager
    def serving(self, policy: Any, timeline: Timeline | None) -> Iterator[ReplayBackend]:
        """Yield a backend that starts at time 0 with an empty cache, or a full one if all fit."""
        residency = Residency(self.shape, self.plan, policy)
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
        routing, layer_s = list[list[tuple[int, ...]]](), list[float]()
        iterations = list[Iteration]()

        def note(routed: RoutedIteration) -> None:
            iterations.append(routed.iteration)
            routing.append(routed.activated)
            layer_s.extend(compute_seconds(self.costs, routed, len(self.slots)))

        server = Server(ReplayBackend(self.trace.request, Listener(note)))
        schedule = self.settings.schedule
        list(server.serve(schedule(self.workload.warmup)))
        measured_from = server.iterations
        layer_s.clear()
        iterations.clear()
        list(server.serve(schedule(self.workload.measured)))
        prefills = [n for n, one in enumerate(iterations) if one.phase == "prefill"]
        decodes = [
            range(prefill + 1, stop)
            for prefill, stop in zip(prefills, [*prefills[1:], len(iterations)], strict=True)
            for _ in iterations[prefill].requests
        ]
        return Reference(routing, measured_from, sum(layer_s), layer_s, decodes)

    def load_seconds(self) -> tuple[float, float]:
        expert_bytes, rate = self.plan.expert_bytes, self.testbed.rate
        own = expert_bytes / rate.bytes_per_second + rate.latency
        return own, expert_bytes / rate.shared_bytes_per_second

    def facts(self, measurement: Measurement) -> dict[str, Any]:
        origin = self.trace.header.provenance
        routing = f"a foreign trace, {origin.get('foreign')}"
        if "model" in origin:
            routing = f"a trace of {origin['model']} with weights {origin['weights']}"
        return {
            "routing": routing,
            "expert_bytes": self.plan.expert_bytes,
            "stored_expert_bytes": self.plan.expert_bytes,
            "positions": origin.get("positions"),
            "cast": origin.get("cast"),
            "prediction_costs": self.costs.prediction_source,
            "summary": {"dense_bytes": full_size(self.cfg.model).dense_bytes},
        }


@contextmanager
def prepare(cfg: DictConfig, testbed: SimulatedTestbed, console: Console) -> Iterator[ReplaySetup]:
    """Open the trace, build policy and costs; raise UserError or TraceError for what cannot be."""
    settings = build(cfg.workload)
    if settings.repeats > 1:  # Another time would be the same.
        settings = replace(settings, repeats=1)
    with open_routing(cfg, console) as trace:
        shape = trace.header.shape
        load = settings.traced(trace, cfg.seed)
        full = full_size(cfg.model).expert_bytes
        policy, budget, slots = build_policy(cfg, shape, full, testbed)
        placement = policy.placement
        contents = ("logits", "embeddings") if placement.prediction != "none" else ()
        hidden = ("hidden_states",) if placement.hidden_states else ()
        trace.require((*contents, *hidden), gates=placement.hidden_states)
        if policy.set_gates and trace.header.gates is not None:
            policy.set_gates(trace.header.gates)
        predicts = placement.prediction != "none" and not policy.set_future_routing
        costs = testbed.costs(cfg.model, cfg.system, predicts)
        if policy.host_experts:
            what = f"system={cfg.system.label} on testbed {testbed.name}"
            with refusing(what, NotImplementedError, remedy="give testbed.host or another testbed"):
                costs.host(1)
        if policy.set_machine:
            rate = testbed.rate
            load_s = full / rate.bytes_per_second + rate.latency
            share = rate.each(testbed.devices) / rate.bytes_per_second
            told = load_s, cache(costs.host), cache(costs.expert), share
            policy.set_machine(Machine(slots, *told))
        plan = MemoryPlan(slots, full, testbed.chunk_bytes, bool(cfg.protect))
        memory = (shape, budget, slots, None, trace, costs, plan)
        yield ReplaySetup(cfg, testbed, settings, load, policy, *memory)


def compute_seconds(costs: CostModel, routed: RoutedIteration, devices: int) -> list[float]:
    """Return the seconds of each layer, all resident; start and finish are of the outer ones."""
    whole = costs.iteration(routed.iteration.tokens, routed.contexts)
    experts = routed.counts.shape[1]
    taken = []
    for layer, activated in enumerate(routed.activated):
        busy = [0.0] * (devices if costs.parallel else 1)
        for index in activated:
            device = (layer * experts + index) % devices
            seconds = costs.expert(int(routed.counts[layer, index]))
            busy[device % len(busy)] += seconds + (costs.hop if device else 0.0)
        taken.append(whole.dense + max(busy))
    taken[0] += whole.start
    taken[-1] += whole.finish
    return taken
