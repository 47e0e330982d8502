"""The one way through a run: prepare, learn from the history, serve and measure, record.

What differs between live runs, replays and other engines is a `Setup`; which one a run gets is its
system's or testbed's `backend`, or follows from the testbed's mode. Offline (section 6.1) a share
of the prompts is the history and the others are measured, after a warm-up; online all are measured.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.run.config import build, check, identity
from experiments.run.console import Console
from experiments.run.metrics import KINDS, AccessCounter, latency_summary, request_table
from experiments.run.records import (
    alone_in,
    existing_record,
    other_code,
    provenance,
    read_record,
    write_record,
)
from experiments.run.schedule import Backend, Served, Server, Step
from experiments.run.tracking import log_record
from experiments.run.weights import fingerprint
from experiments.run.workloads import Workload, WorkloadSettings
from finemoe.offload.bounds import Roofline, minimal_loads
from finemoe.offload.policy import ModelShape, Policy, PolicyError, Routing
from finemoe.offload.runtime import PhaseSeconds
from finemoe.offload.timeline import Timeline, trace_events
from finemoe.offload.transfer import Traffic
from finemoe.testbed import SimulatedTestbed, Testbed
from finemoe.trace import TraceError

Facts = dict[str, Any]
ON_HOST = "not comparable bit for bit: experts computed on the host"
"""What is said of logits that a host and devices made together."""
BACKENDS = {
    "measured": "experiments.run.live.prepare",
    "emulated": "experiments.run.live.prepare",
    "simulated": "experiments.run.replay.prepare",
}
"""What prepares a run on a testbed of this mode."""


@dataclass
class Measurement:
    """What serving the measured requests left behind, over all repeats."""

    served: list[Served] = field(default_factory=list)
    accesses: AccessCounter = field(default_factory=AccessCounter)
    traffic: Traffic = field(default_factory=Traffic)
    phases: PhaseSeconds = field(default_factory=PhaseSeconds)
    peak_occupied: int = 0
    busy_seconds: float = 0.0  # time during which requests were served

    @contextmanager
    def of(self, runtime: Any) -> Iterator[None]:
        """Add what a runtime (live or replay) does within the block."""
        runtime.listeners.append(self.accesses)
        before, runtime.phases = runtime.residency.traffic(), PhaseSeconds()
        yield
        runtime.drain()
        self.traffic += runtime.residency.traffic() - before
        self.phases += runtime.phases
        self.peak_occupied = max(self.peak_occupied, runtime.residency.cache.peak_occupied)


@dataclass(frozen=True)
class Reference:
    """What serving would be with every expert resident: bounds and oracles need it beforehand."""

    routing: Routing  # of warm-up and measured requests
    measured_from: int  # number of the first measured iteration
    compute_s: float | None  # to serve the measured requests; None if not all was resident


@dataclass
class Setup(ABC):
    """One prepared run: what the protocol needs to know of what serves."""

    cfg: DictConfig
    testbed: Testbed | SimulatedTestbed
    settings: WorkloadSettings
    workload: Workload
    policy: Policy | None
    shape: ModelShape
    slots: tuple[int, ...]  # of each device
    log: Any = field(init=False, default=None)  # the LogitsLog of the reference, if it is verified

    @abstractmethod
    def description(self) -> tuple[str, ...]:
        """Return lines that say what runs where; the first one begins with the model's name."""

    @abstractmethod
    def facts(self, measurement: Measurement) -> dict[str, Any]:
        """Return what the run record says of this backend; see `run_record`."""

    @abstractmethod
    def serving(
        self, policy: Policy | None, timeline: Timeline | None
    ) -> AbstractContextManager[Any]:
        """Return a backend with an empty cache, which serves under the memory budget.

        In the block of its `measuring(measurement)` it adds to the measurement what is served.
        """

    def learning(self, policy: Policy) -> AbstractContextManager[tuple[Backend, str]]:
        """Return a backend that serves the history, and in words how it does."""
        raise NotImplementedError

    def record_routing(self, path: Path, console: Console) -> None:
        """Record what history and measured requests route, if the backend can."""

    def reference(self, console: Console) -> Reference | None:
        """Serve warm-up and measured requests once; None if nothing asks for it."""
        return None

    def link_seconds(self, loads: Sequence[int]) -> float | None:
        """Return the least seconds for so many loads over each link; None if not known."""
        return None

    def bound(self, reference: Reference | None) -> Roofline | None:
        """Return the least time the measured requests could take; None without what it needs."""
        if reference is None or reference.compute_s is None:
            return None
        loads = minimal_loads(reference.routing, self.shape, self.slots, reference.measured_from)
        link_s, repeats = self.link_seconds(loads), self.settings.repeats
        if link_s is None:
            return None
        return Roofline(reference.compute_s * repeats, link_s * repeats)

    def watch(self, backend: Any) -> Callable[[Step], None] | None:
        """Return what verifies the logits of each measured step, if they are to be verified."""
        return self.log and (lambda step: self.log.compare(step, backend.logits))

    def lossless(self, console: Console) -> bool | None:
        """Tell whether all logits were those of the reference; None if not verified."""
        return self.log and self.log.same

    def sample(self, served: Served) -> tuple[str, str] | None:
        """Return prompt and continuation of a request as text, if there is any."""
        return None


def run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Carry out one run, write its record, and return it. Raises UserError."""
    check(cfg)
    if facts := cfg.model.get("facts"):
        console.announce([facts])
    try:
        with prepare(cfg, console) as setup:
            console.announce(setup.description())
            if cfg.record:
                setup.record_routing(Path(cfg.output) / "trace.parquet", console)
            history = build_history(setup, console)
            reference = setup.reference(console) if setup.settings.fixed else None
            measurement = measure(setup, reference, console)
            # What the host computes need not be loaded: then loads are no bound.
            hosted = setup.policy is not None and setup.policy.host_experts is not None
            limit = None if hosted else setup.bound(reference)
            lossless = setup.lossless(console)
            requests = request_table(measurement.served, measurement.accesses)
            facts = setup.facts(measurement)
            # What a backend has none of is missing from both.
            requests[[kind for kind in KINDS if kind in facts["summary"]]] = None
            summary = _summary(setup, facts, measurement, limit, lossless)
            summary |= latency_summary(requests, setup.workload.prompts.dataset)
            record = run_record(setup, history, measurement.served, facts, summary)
            path = write_record(Path(cfg.output), record, requests)
            console.results(record, path, setup.sample(measurement.served[0]))
            return record
    except (PolicyError, TraceError) as error:
        raise UserError(str(error)) from error


def ensure_record(cfg: DictConfig, console: Console | None = None) -> dict[str, Any]:
    """Return the complete record of this config, made if need be and logged if asked for.

    Raises UserError.
    """
    folder, console = Path(cfg.output), console or Console(quiet=True)
    path = existing_record(cfg)
    # Another process may make it meanwhile.
    with nullcontext() if path else alone_in(folder):
        path = path or existing_record(cfg)
        record = read_record(path) if path else run(cfg, console)
    if path:
        console.skipped(path, other_code(record))
    if cfg.logger.name == "wandb":
        log_record(cfg.logger.project, folder, record)
    return record


def prepare(cfg: DictConfig, console: Console) -> Any:
    """Return the setup of a run, to be entered. Raises UserError for what cannot be."""
    testbed = build(cfg.testbed)
    name = cfg.system.get("backend") or cfg.testbed.get("backend") or BACKENDS[testbed.mode]
    try:
        backend = get_method(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"backend={name}: {error}; set PYTHONPATH to its folder") from error
    return backend(cfg, testbed, console)


def build_history(setup: Setup, console: Console) -> str:
    """Serve the history requests and save what they left; return how the history came about."""
    policy, requests, store = setup.policy, setup.workload.history, setup.cfg.store
    if policy is None:
        return "none"
    came = "loaded" if store.load else "none"
    if policy.learn and requests and not store.load:
        schedule = setup.settings.schedule(requests, history=True)
        with setup.learning(policy) as (backend, came):
            with console.progress("history", len(requests)) as bar:
                for _ in Server(backend).serve(schedule):
                    bar(1)
            backend.drain()
    if store.save and policy.history:  # Before anything measured has been seen.
        policy.history.save(Path(store.save), identity(setup.cfg))
    policy.begin_serving()
    return came


def measure(setup: Setup, reference: Reference | None, console: Console) -> Measurement:
    """Serve warm-up and measured requests; every repeat begins anew, with an empty cache."""
    settings, load, repeats = setup.settings, setup.workload, setup.settings.repeats
    if reference is not None and setup.policy and setup.policy.set_future_routing:
        setup.policy.set_future_routing([*reference.routing] * repeats)
    measurement, batches, iterations = Measurement(), 0, 0
    progress = console.progress("serving", (len(load.warmup) + len(load.measured)) * repeats)
    with trace_events(setup.cfg.output, setup.cfg.timeline) as timeline, progress as bar:
        for _ in range(repeats):
            with setup.serving(copy.deepcopy(setup.policy), timeline) as backend:
                # Numbers go on, so that every batch and iteration has its own.
                server = Server(backend, batches, iterations)
                bar(len(list(server.serve(settings.schedule(load.warmup)))))
                backend.drain()
                server.busy_seconds = 0.0
                server.listeners += filter(None, [setup.watch(backend)])
                with backend.measuring(measurement):
                    for served in server.serve(settings.schedule(load.measured)):
                        measurement.served.append(served)
                        bar(1)
                measurement.busy_seconds += server.busy_seconds
                batches, iterations = server.batches, server.iterations
            # They hold the slots, and the next repeat takes as many.
            del backend, server
    measurement.served.sort(key=lambda served: served.batch)
    return measurement


def run_record(
    setup: Setup, history: str, served: Sequence[Served], facts: Facts, summary: Facts
) -> Facts:
    """Return the run record; the backend's facts go over what holds for every one."""
    cfg, load = setup.cfg, setup.workload
    positions = facts["positions"]
    return {
        "status": "complete",
        "mode": setup.testbed.mode,
        "testbed": setup.testbed.name,
        "system": cfg.system.label,
        "model": cfg.model.name,
        "weights": str(cfg.weights),
        "weights_fingerprint": fingerprint(cfg.model, str(cfg.weights), cfg.seed),
        "dataset": load.prompts.dataset,
        "dataset_source": load.prompts.source,
        "dataset_sha256": load.prompts.sha256,
        "shared_prefix": load.shared_prefix(),
        "slots": list(setup.slots),
        "time_scale": setup.testbed.time_scale,
        "seed": cfg.seed,
        "history": history,
        "prediction_costs": None,
        "online": setup.settings.arrivals(load, served, positions, cfg.seed),
        **facts,
        "positions": _positions(positions, served),
        "summary": {**summary, **facts["summary"]},
        **provenance(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }


def _positions(made_for: int | None, served: Sequence[Served]) -> dict[str, int] | None:
    """Say how long requests were, prompt and answer; beyond its positions no model was trained."""
    if made_for is None:
        return None
    lengths = [len(one.request.prompt) + len(one.tokens) for one in served]
    beyond = sum(length > made_for for length in lengths)
    return {"model": made_for, "longest": max(lengths), "beyond": beyond, "of": len(lengths)}


def _summary(
    setup: Setup, facts: Facts, measurement: Measurement, limit: Roofline | None, same: bool | None
) -> Facts:
    """Return what was measured apart from latencies; bytes are those of full-size experts."""
    larger, busy_s = facts["expert_bytes"] / facts["stored_expert_bytes"], measurement.busy_seconds
    moved = asdict(measurement.traffic).items()
    history = setup.policy and setup.policy.history
    accesses = measurement.accesses.summary(sum(setup.slots), setup.shape.layers)
    otherwise = accesses["host"] and setup.testbed.mode == "measured"
    return {
        **accesses,
        "lossless": None if otherwise else same,
        "lossless_note": ON_HOST if otherwise else None,
        "same_tokens": setup.log and setup.log.same_tokens,
        **{f"bytes_{kind}": round(count * larger) for kind, count in moved},
        "bytes_not_copied": accesses["host"] * facts["expert_bytes"],
        "peak_slot_bytes": measurement.peak_occupied * facts["expert_bytes"],
        "phase_seconds": asdict(measurement.phases),
        "busy_seconds": busy_s,
        "history_bytes": history.memory_bytes() if history else {},
        "bound": limit and {**asdict(limit), "times": limit.times(busy_s)},
    }
