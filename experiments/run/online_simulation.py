"""One simulated online run: arrivals in virtual time over a routing trace, then recorded.

The schedule is the live one; here its iterations take the time that the testbed's costs say, and
waiting for an arrival advances the clock. What a request routes does not depend on when it comes,
so one trace serves every rate and batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.arrivals import Arrival
from experiments.run.config import online_settings
from experiments.run.console import Console
from experiments.run.continuous import Schedule, ServedOnline, ServiceTimes, Step, run_schedule
from experiments.run.metrics import request_table
from experiments.run.online import (
    ArrivalPlan,
    OnlineSettings,
    OnlineWorkload,
    TimedRequest,
    planned,
)
from experiments.run.online_serving import check_store, online_facts
from experiments.run.records import write_record
from experiments.run.replay_serving import Fetch
from experiments.run.routing_source import open_routing
from experiments.run.run_record import Measurement, run_record
from experiments.run.simulation import ReplayEngine, prepare_engine, replay_facts, replay_runtime
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.routed import joined
from finemoe.offload.timeline import trace_events
from finemoe.testbed import SimulatedTestbed
from finemoe.trace import TracedRequest, TraceError


@dataclass(frozen=True)
class OnlineSimulation(ReplayEngine):
    """What one simulated online run consists of."""

    settings: OnlineSettings
    plan_of_arrivals: ArrivalPlan


def simulate_online(cfg: DictConfig, testbed: SimulatedTestbed, console: Console) -> dict[str, Any]:
    """Carry out one simulated online run and write its record; return it. Raises UserError."""
    settings = online_settings(cfg.workload)
    check_store(cfg)
    try:
        with open_routing(cfg, console) as trace:
            engine = prepare_engine(cfg, testbed, trace)
            console.announce_replay(testbed, cfg, trace, engine.plan.slots)
            arrivals = planned(settings, cfg.seed)
            simulation = OnlineSimulation(
                **vars(engine), settings=settings, plan_of_arrivals=arrivals
            )
            return _run(simulation, console)
    except TraceError as error:
        raise UserError(str(error)) from error


def _run(simulation: OnlineSimulation, console: Console) -> dict[str, Any]:
    served, measurement = measure(simulation, console)
    facts = replay_facts(
        simulation,
        "loaded" if simulation.cfg.store.load else "none",
        online=_facts(simulation, served),
    )
    record = run_record(simulation.cfg, facts, measurement)
    requests = request_table(served, measurement.accesses)
    path = write_record(Path(simulation.cfg.output), record, requests)
    console.results(record, path, None)
    return record


def measure(
    simulation: OnlineSimulation, console: Console
) -> tuple[list[ServedOnline], Measurement]:
    """Replay the requests as they arrive, from an empty store and cache."""
    policy = simulation.policy
    policy.begin_serving()
    arrivals = simulation.plan_of_arrivals.arrivals
    with (
        trace_events(simulation.cfg.output, simulation.cfg.timeline) as timeline,
        console.progress("replaying", len(arrivals)) as advance,
    ):
        runtime, measurement = replay_runtime(simulation, policy, timeline), Measurement()
        runtime.listeners.append(measurement.accesses)
        before = runtime.residency.traffic()
        server = OnlineReplay(runtime, fetch_by_length(arrivals, simulation.trace.request), advance)
        served = server.serve(arrivals, simulation.settings.max_batch_size)
        runtime.drain()
    measurement.served += served
    measurement.busy_seconds = server.busy_seconds
    measurement.traffic = runtime.residency.traffic() - before
    measurement.phases = runtime.phases
    measurement.peak_occupied = runtime.residency.cache.peak_occupied
    return served, measurement


def fetch_by_length(arrivals: Sequence[Arrival], fetch: Fetch) -> Fetch:
    """Return a fetch that raises TraceError for a request of other lengths than its arrival's."""

    def checked(number: int) -> TracedRequest:
        asked, traced = arrivals[number], fetch(number)
        found = len(traced.prompt), len(traced.steps)
        if found[0] != asked.input_tokens or found[1] < asked.output_tokens:
            raise TraceError(
                f"the trace holds request {number} with {found[0]} input and {found[1]} output "
                f"tokens, the workload asks for {asked.input_tokens} and {asked.output_tokens}; "
                "set routing=null to record one for it"
            )
        return traced

    return checked


@dataclass
class OnlineReplay:
    """Serves arrivals through one replay runtime; only running requests are held in memory."""

    runtime: ReplayRuntime
    fetch: Fetch
    advance: Callable[[int], None]
    busy_seconds: float = 0.0
    """Virtual time during which iterations ran."""
    _running: dict[int, TracedRequest] = field(default_factory=dict)
    _tokens: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Prompt and answer of every request that was served."""

    def serve(self, arrivals: Sequence[Arrival], max_batch_size: int) -> list[ServedOnline]:
        """Serve requests as they arrive; return them in order of their start."""
        requests = [
            TimedRequest(number, (), one.output_tokens, one.seconds)
            for number, one in enumerate(arrivals)
        ]
        order = run_schedule(Schedule(requests, max_batch_size), self._carry_out, self._wait)
        return [self._served(place, times) for place, times in enumerate(order)]

    def _carry_out(self, step: Step, begin: float) -> float:
        numbers = [request.number for request in step.requests]
        if step.phase == "prefill":
            self._running[numbers[0]] = self.fetch(numbers[0])
        traced = [self._running[number] for number in numbers]
        pairs = list(zip(traced, step.generated, strict=True))
        steps = [one.steps[made] for one, made in pairs]
        contexts = [len(one.prompt) + made for one, made in pairs]
        self.runtime.forward(joined(step.number, numbers, steps, contexts))
        for request in step.leaving:
            self.runtime.end_request(request.number)
            one = self._running.pop(request.number)
            self._tokens[request.number] = one.prompt, one.output[: request.output_tokens]
        self.advance(len(step.leaving))
        self.busy_seconds += self.runtime.now - begin
        return self.runtime.now

    def _wait(self, until: float) -> float:
        self.runtime.wait_until(until)
        return self.runtime.now

    def _served(self, place: int, times: ServiceTimes) -> ServedOnline:
        prompt, tokens = self._tokens.pop(times.request.number)
        request = replace(times.request, prompt=prompt)
        return ServedOnline(
            request, place, tokens, times.token_times, times.iterations, times.queueing
        )


def _facts(simulation: OnlineSimulation, served: Sequence[ServedOnline]) -> dict[str, Any]:
    """Return what the record says of the workload, the passes of whose prompts the trace knows."""
    origin, arrivals = simulation.trace.header.provenance, simulation.plan_of_arrivals
    requests = sorted((one.request for one in served), key=lambda request: request.number)
    workload = OnlineWorkload(
        tuple(requests), arrivals.source, arrivals.shortened, origin.get("passes")
    )
    return online_facts(simulation.settings, workload, served, origin.get("positions"))
