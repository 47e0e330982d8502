"""One simulated run: a routing trace replayed in the virtual time of a testbed, then recorded.

The protocol is the live one: history requests prepare the system, a warm-up fills the cache, the
others are measured. Nothing is computed, so nothing can be verified: `lossless` is not set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.config import (
    budget_slots,
    build,
    check_room,
    full_size,
    identity,
    learns,
    load_store,
    workload_settings,
)
from experiments.run.console import Console
from experiments.run.metrics import request_table
from experiments.run.records import write_record
from experiments.run.replay_serving import Fetch, ReplayServer, fetch_all, routed_step
from experiments.run.routing_source import open_routing
from experiments.run.run_record import Measurement, RunFacts, run_record
from experiments.run.serving import in_batches
from experiments.run.workloads import OfflineSettings, OfflineWorkload, Request, split
from finemoe.offload.bounds import Roofline, minimal_loads
from finemoe.offload.policy import Gates, Policy
from finemoe.offload.replay import CostModel, ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.routed import RoutedIteration
from finemoe.offload.runtime import PhaseSeconds
from finemoe.offload.timeline import Timeline, trace_events
from finemoe.testbed import SimulatedTestbed
from finemoe.trace import Trace, TraceError

UNKNOWN = "unknown: a foreign trace"


@dataclass(frozen=True)
class ReplayEngine:
    """What serves in a simulated run, whatever is served."""

    cfg: DictConfig
    testbed: SimulatedTestbed
    trace: Trace
    policy: Policy
    costs: CostModel
    plan: MemoryPlan
    budget_bytes: int


@dataclass(frozen=True)
class Simulation(ReplayEngine):
    """What one simulated offline run consists of."""

    settings: OfflineSettings
    workload: OfflineWorkload
    fetch: Fetch


def simulate(cfg: DictConfig, testbed: SimulatedTestbed, console: Console) -> dict[str, Any]:
    """Carry out one simulated run and write its record; return the record. Raises UserError."""
    try:
        with open_routing(cfg, console) as trace:
            simulation = prepare(cfg, testbed, trace)
            console.announce_replay(testbed, cfg, trace, simulation.plan.slots)
            return _run(simulation, console)
    except TraceError as error:
        raise UserError(str(error)) from error


def prepare(cfg: DictConfig, testbed: SimulatedTestbed, trace: Trace) -> Simulation:
    """Build workload, policy and costs; raise UserError or TraceError for what cannot be."""
    settings = workload_settings(cfg.workload)
    engine = prepare_engine(cfg, testbed, trace)
    kept = max(settings.batch_size, settings.history_batch_size)
    return Simulation(
        **vars(engine),
        settings=settings,
        workload=_workload(trace, settings, cfg.seed),
        fetch=lru_cache(maxsize=kept)(trace.request),
    )


def prepare_engine(cfg: DictConfig, testbed: SimulatedTestbed, trace: Trace) -> ReplayEngine:
    """Build policy and costs; raise UserError or TraceError for what cannot be."""
    shape = trace.header.shape
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
    load_store(cfg, policy, identity(cfg))
    predicts = placement.prediction != "none" and not policy.set_future_routing
    costs = testbed.costs(cfg.model, cfg.system.label, predicts)
    plan = MemoryPlan(slots, full, testbed.chunk_bytes)
    return ReplayEngine(cfg, testbed, trace, policy, costs, plan, budget)


def _workload(trace: Trace, settings: OfflineSettings, seed: int) -> OfflineWorkload:
    """Split the traced requests, which are numbered in the order of the split."""
    numbers = sorted(trace.numbers)
    if len(numbers) < settings.prompts:
        raise TraceError(
            f"{trace.path}: holds {len(numbers)} requests, not {settings.prompts}; "
            "lower workload.prompts"
        )
    tokens = settings.output_tokens
    requests = [Request(number, (), tokens) for number in numbers[: settings.prompts]]
    return split(requests, settings)


def _run(simulation: Simulation, console: Console) -> dict[str, Any]:
    history = teach(simulation, console)
    measurement = measure(simulation, console)
    limit = bound(simulation)
    record = run_record(simulation.cfg, replay_facts(simulation, history, limit), measurement)
    requests = request_table(measurement.served, measurement.accesses)
    path = write_record(Path(simulation.cfg.output), record, requests)
    console.results(record, path, None)
    return record


def teach(simulation: Simulation, console: Console) -> str:
    """Show the history to the policy, with no cache and no clock; return how it came about."""
    policy, settings = simulation.policy, simulation.settings
    history, served = simulation.workload.history, "none"
    if simulation.cfg.store.load:
        served = "loaded"
    elif learns(policy) and history:
        served = "replayed with everything resident"
        with console.progress("history", len(history)) as advance:
            number = 0
            for batch in in_batches(history, settings.history_batch_size):
                number = _teach_batch(simulation, batch, number)
                advance(len(batch))
    if simulation.cfg.store.save:
        assert policy.history
        policy.history.save(Path(simulation.cfg.store.save), identity(simulation.cfg))
    policy.begin_serving()
    return served


def _teach_batch(simulation: Simulation, batch: Sequence[Request], number: int) -> int:
    policy = simulation.policy
    assert policy.learn
    traced = fetch_all(batch, simulation.fetch)
    for step in range(batch[0].output_tokens):
        routed = routed_step(traced, step, number)
        hidden = routed.hidden_states if policy.placement.hidden_states else None
        gates = Gates(routed.probabilities, routed.activated, hidden)
        policy.learn(routed.iteration, routed.embeddings, gates)
        number += 1
    for request in batch:
        policy.end_request(request.number)
    return number


def measure(simulation: Simulation, console: Console) -> Measurement:
    """Replay warm-up and measured requests once: another time would be the same."""
    load, size = simulation.workload, simulation.settings.batch_size
    policy = copy.deepcopy(simulation.policy)
    if policy.set_future_routing:
        policy.set_future_routing([one.activated for one in iterations(simulation)])
    total = len(load.warmup) + len(load.measured)
    with (
        trace_events(simulation.cfg.output, simulation.cfg.timeline) as timeline,
        console.progress("replaying", total) as advance,
    ):
        runtime = replay_runtime(simulation, policy, timeline)
        server, measurement = ReplayServer(runtime, simulation.fetch), Measurement()
        for batch in in_batches(load.warmup, size):
            server.serve(batch)
            advance(len(batch))
        runtime.drain()
        runtime.listeners.append(measurement.accesses)
        before, runtime.phases = runtime.residency.traffic(), PhaseSeconds()
        for batch in in_batches(load.measured, size):
            began = runtime.now
            measurement.served += server.serve(batch)
            measurement.busy_seconds += runtime.now - began
            advance(len(batch))
        runtime.drain()
    measurement.traffic = runtime.residency.traffic() - before
    measurement.phases = runtime.phases
    measurement.peak_occupied = runtime.residency.cache.peak_occupied
    return measurement


def replay_runtime(
    engine: ReplayEngine, policy: Policy, timeline: Timeline | None = None
) -> ReplayRuntime:
    """Return a runtime that starts at time 0 with an empty cache, or a full one if all fit."""
    residency = Residency(engine.trace.header.shape, engine.plan, policy)
    if residency.holds_everything:
        residency.preload()
    return ReplayRuntime(policy, residency, engine.costs, engine.testbed.rate, timeline)


def iterations(simulation: Simulation) -> Iterator[RoutedIteration]:
    """Yield the iterations of warm-up and measured requests in the order of serving."""
    load, number = simulation.workload, 0
    for requests in (load.warmup, load.measured):
        for batch in in_batches(requests, simulation.settings.batch_size):
            traced = fetch_all(batch, simulation.fetch)
            for step in range(batch[0].output_tokens):
                yield routed_step(traced, step, number)
                number += 1


def bound(simulation: Simulation) -> Roofline:
    """Return the least time that the measured requests could take on this testbed."""
    load, settings = simulation.workload, simulation.settings
    warmup_batches = list(in_batches(load.warmup, settings.batch_size))
    measured_from = sum(batch[0].output_tokens for batch in warmup_batches)
    shape, plan = simulation.trace.header.shape, simulation.plan
    routing, compute_s = [], 0.0
    for one in iterations(simulation):
        routing.append(one.activated)
        if one.iteration.number >= measured_from:
            compute_s += compute_seconds(simulation.costs, one, len(plan.slots))
    loads = minimal_loads(routing, shape, plan.slots, measured_from)
    rate = simulation.testbed.rate
    link_s = max(loads) * (plan.expert_bytes / rate.bytes_per_second + rate.latency)
    shared_s = sum(loads) * plan.expert_bytes / rate.shared_bytes_per_second
    return Roofline(compute_s, max(link_s, shared_s))


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


def replay_facts(
    engine: ReplayEngine,
    history: str,
    bound: Roofline | None = None,
    online: Mapping[str, Any] | None = None,
) -> RunFacts:
    """Return the facts of a simulated run."""
    origin = engine.trace.header.provenance
    return RunFacts(
        mode=engine.testbed.mode,
        testbed=engine.testbed.name,
        routing=_origin(engine.trace),
        dataset=str(origin.get("dataset", UNKNOWN)),
        dataset_source=str(origin.get("dataset_source", UNKNOWN)),
        dataset_sha256=str(origin.get("dataset_sha256", UNKNOWN)),
        budget_bytes=engine.budget_bytes,
        slots=engine.plan.slots,
        expert_bytes=engine.plan.expert_bytes,
        stored_expert_bytes=engine.plan.expert_bytes,
        dense_bytes=full_size(engine.cfg.model).dense_bytes,
        time_scale=engine.testbed.time_scale,
        history=history,
        history_bytes=engine.policy.history.memory_bytes() if engine.policy.history else {},
        positions=origin.get("positions"),
        prediction_costs=engine.costs.prediction_source,
        bound=bound,
        online=online,
    )


def _origin(trace: Trace) -> str:
    origin = trace.header.provenance
    if "model" not in origin:
        return f"a foreign trace, {trace.path.name}"
    return f"a trace of {origin['model']} with weights {origin['weights']}"
