"""The one way through a run: prepare, learn from the history, serve and measure, record.

Offline (section 6.1) a share of the prompts is the history; online all are measured. Latencies are
those of vLLM's benchmark; all but TPOT and ITL count from the arrival. A hit was resident when its
gate asked.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from experiments.bootstrap import interval, request_draws
from experiments.errors import UserError, refusing
from experiments.run import records
from experiments.run.config import build, check, identity
from experiments.run.console import Console
from experiments.run.schedule import Backend, Served, Server, Step
from experiments.run.weights import fingerprint
from experiments.run.workloads import Workload, WorkloadSettings
from finemoe.offload.bounds import Roofline, critical_path, minimal_loads
from finemoe.offload.policy import LayerOutcome, ModelShape, Phase, Policy, PolicyError, Routing
from finemoe.offload.runtime import PhaseSeconds
from finemoe.offload.timeline import Timeline, trace_events
from finemoe.offload.transfer import Traffic
from finemoe.testbed import SimulatedTestbed, Testbed
from finemoe.trace import TraceError

Facts = dict[str, Any]
KINDS = ("hits", "late", "misses", "host")  # resident, on its way, not requested, computed there
ON_HOST = "not comparable bit for bit: experts computed on the host"
BACKENDS = {  # what prepares a run on a testbed of this mode
    "measured": "experiments.run.live.prepare",
    "emulated": "experiments.run.live.prepare",
    "simulated": "experiments.run.replay.prepare",
}


def accesses_of(one: LayerOutcome) -> tuple[Any, ...]:
    """Return what a run remembers of a layer: iteration, phase, and accesses by KINDS."""
    kinds = (one.hits, one.late, one.misses, one.host)
    return one.iteration.number, one.iteration.phase, *map(len, kinds)


def access_table(layers: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    """Return a row per iteration: its `phase`, accesses by KINDS, and the `most` in a layer."""
    table = pd.DataFrame(layers, columns=["iteration", "phase", *KINDS])
    table["most"] = table[[*KINDS]].sum(axis=1)
    each = {"phase": "first", **dict.fromkeys(KINDS, "sum"), "most": "max"}
    return table.groupby("iteration", sort=False).agg(each)


def access_summary(accesses: pd.DataFrame, slots: int, layers: int) -> Facts:
    """Return counts and hit rates, in all and by phase; the rate is None without an access.

    `union_over_capacity` of a phase tells how many experts an iteration activates in a layer, all
    its tokens together, over the `slots / layers` that are a layer's share of the cache: mean and
    maximum over iterations and layers, None without an access. Above 1, one step of one layer alone
    is more than its share holds.
    """

    def rated(rows: pd.DataFrame) -> Facts:
        counts = counted(rows)
        total = sum(counts.values())
        return {**counts, "expert_hit_rate": counts["hits"] / total if total else None}

    phases = {}
    for name in get_args(Phase):
        rows, union = accesses[accesses["phase"] == name], None
        # Experts of one step in a layer, over the slots that are the layer's share.
        if total := sum(counted(rows).values()):
            most = int(rows["most"].max()) * layers / slots
            union = {"mean": total / len(rows) / slots, "max": most}
        phases[name] = {**rated(rows), "union_over_capacity": union}
    return {**rated(accesses), "phases": phases}


def counted(accesses: pd.DataFrame) -> dict[str, int]:
    """Return the accesses of some iterations, by kind."""
    return {kind: int(accesses[kind].sum()) for kind in KINDS}


@dataclass
class Measurement:
    """What serving the measured requests left behind, over all repeats."""

    served: list[Served] = field(default_factory=list)
    accesses: list[tuple[Any, ...]] = field(default_factory=list)  # see `accesses_of`
    traffic: Traffic = field(default_factory=Traffic)
    phases: PhaseSeconds = field(default_factory=PhaseSeconds)
    peak_occupied: int = 0
    busy_seconds: float = 0.0  # time during which requests were served


@dataclass(frozen=True)
class Reference:
    """What serving would be with every expert resident: bounds and oracles need it beforehand."""

    routing: Routing  # of warm-up and measured requests
    measured_from: int  # number of the first measured iteration
    compute_s: float | None  # to serve the measured requests; None if not all was resident
    layer_s: Sequence[float] = ()  # of them, layer by layer, where that is known
    decodes: Sequence[range] = ()  # of each of them, where it decodes: iterations, 0 the first


@dataclass
class Setup(ABC):
    """One prepared run: what the protocol needs to know of what serves."""

    cfg: DictConfig
    testbed: Testbed | SimulatedTestbed
    settings: WorkloadSettings
    workload: Workload
    policy: Policy | None
    shape: ModelShape
    budget_bytes: int | None  # None where no budget is kept
    slots: tuple[int, ...]  # of each device
    tokenizer: Any  # None where nothing is generated
    log: Any = field(init=False, default=None)  # the LogitsLog of the reference, if it is verified

    @abstractmethod
    def description(self) -> tuple[str, ...]:
        """Return lines that say what runs where; the first one begins with the model's name."""

    @abstractmethod
    def facts(self, measurement: Measurement) -> Facts:
        """Return what the run record says of this backend; see `run_record`."""

    @abstractmethod
    def serving(self, policy: Any, timeline: Timeline | None) -> AbstractContextManager[Any]:
        """Return a backend with an empty cache, which serves under the memory budget."""

    @contextmanager
    def measuring(self, backend: Any, measurement: Measurement) -> Iterator[None]:
        """Add to a measurement what a backend's runtime does within the block."""
        runtime = backend.runtime
        runtime.listeners.append(lambda one: measurement.accesses.append(accesses_of(one)))
        before, runtime.phases = runtime.residency.traffic(), PhaseSeconds()
        yield
        runtime.drain()
        measurement.traffic += runtime.residency.traffic() - before
        measurement.phases += runtime.phases
        occupied = runtime.residency.cache.peak_occupied
        measurement.peak_occupied = max(measurement.peak_occupied, occupied)

    def learning(self, policy: Policy) -> AbstractContextManager[tuple[Backend, str]]:
        """Return a backend that serves the history, and in words how it does."""
        raise NotImplementedError

    def record_routing(self, path: Path, console: Console) -> None:
        """Record what history and measured requests route, if the backend can."""

    def reference(self, console: Console) -> Reference | None:
        """Serve warm-up and measured requests once; None if nothing asks for it."""
        return None

    def load_seconds(self) -> tuple[float, float] | None:
        """Return seconds of a load: of its own link, and of what all share; None if not known."""
        return None

    def bound(self, reference: Reference | None) -> Roofline | None:
        """Return the least time the measured requests could take; None without what it needs."""
        load_s = self.load_seconds()
        if reference is None or reference.compute_s is None or load_s is None:
            return None
        loads = minimal_loads(reference.routing, self.shape, self.slots, reference.measured_from)
        link_s, path_s = max(max(loads) * load_s[0], sum(loads) * load_s[1]), 0.0
        tpot_s, decodes = None, reference.decodes
        if layer_s := reference.layer_s:
            measured = reference.routing[reference.measured_from :]
            of = measured, self.shape, self.slots, layer_s, *load_s
            path_s, *decode_s = critical_path(*of, parts=decodes)
            if all(decodes):
                tpot_s = float(np.mean(np.array(decode_s) / [*map(len, decodes)]))
        times = self.settings.repeats
        return Roofline(reference.compute_s * times, link_s * times, path_s * times, tpot_s)

    def watch(self, backend: Any) -> Callable[[Step], None] | None:
        """Return what verifies the logits of each measured step, if they are to be verified."""
        return self.log and (lambda step: self.log.compare(step, backend.logits))

    def lossless(self, console: Console) -> bool | None:
        """Tell whether all logits were those of the reference; None if not verified."""
        return self.log and self.log.same


def run(cfg: DictConfig, console: Console) -> Facts:
    """Carry out one run, write its record, and return it. Raises UserError."""
    check(cfg)
    if facts := cfg.model.get("facts"):
        console.announce([facts])
    try:
        with prepare(cfg, console) as setup:
            whence = "prompts from {dataset}: {dataset_source}".format_map(setup.workload.origin)
            console.announce([*setup.description(), whence])
            if cfg.record:
                setup.record_routing(Path(cfg.output) / "trace.parquet", console)
            history = build_history(setup, console)
            reference = setup.reference(console) if setup.settings.fixed else None
            measurement = measure(setup, reference, console)
            # What the host computes need not be loaded: then loads are no bound.
            hosted = setup.policy is not None and setup.policy.host_experts is not None
            lossless, limit = setup.lossless(console), None if hosted else setup.bound(reference)
            record, requests = run_record(setup, history, measurement, lossless, limit)
            path, sample = records.write_record(Path(cfg.output), record, requests), None
            if setup.tokenizer and setup.settings.fixed:
                first = measurement.served[0]
                texts = first.request.prompt, first.tokens
                sample = [setup.tokenizer.decode(list(ids)) for ids in texts]
            console.results(record, path, sample)
            return record
    except (PolicyError, TraceError) as error:
        raise UserError(str(error)) from error


def ensure_record(cfg: DictConfig, console: Console | None = None) -> Facts:
    """Return this config's complete record, made and logged if need be; raise UserError."""
    folder, console = Path(cfg.output), console or Console(quiet=True)
    path = records.existing_record(cfg)
    # Another process may make it meanwhile.
    with nullcontext() if path else records.alone_in(folder):
        path = path or records.existing_record(cfg)
        record = records.read_record(path) if path else run(cfg, console)
    if path:
        other = records.other_code(record)
        console.announce([f"already complete: {path}{f' ({other})' if other else ''}"])
    if cfg.logger.name == "wandb":
        records.log_record(cfg.logger.project, folder, record)
    return record


def prepare(cfg: DictConfig, console: Console) -> Any:
    """Return the setup of a run, to be entered. Raises UserError for what cannot be."""
    testbed = build(cfg.testbed)
    name = cfg.system.get("backend") or cfg.testbed.get("backend") or BACKENDS[testbed.mode]
    remedy = "set PYTHONPATH to its folder"
    with refusing(f"backend={name}", ImportError, ValueError, remedy=remedy):
        backend = get_method(name)
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
                with setup.measuring(backend, measurement):
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
    setup: Setup,
    history: str,
    measurement: Measurement,
    lossless: bool | None,
    limit: Roofline | None,
) -> tuple[Facts, pd.DataFrame]:
    """Return the run record, in bytes of full-size experts, and the request table."""
    cfg, load, served = setup.cfg, setup.workload, measurement.served
    accesses = access_table(measurement.accesses)
    facts, requests = setup.facts(measurement), request_table(served, accesses)
    # What a backend has none of is missing from both.
    requests[[kind for kind in KINDS if kind in facts["summary"]]] = None
    larger, positions = facts["expert_bytes"] / facts["stored_expert_bytes"], facts["positions"]
    beyond = None
    if positions is not None:  # No model was trained beyond its positions.
        lengths = requests["input_tokens"] + requests["output_tokens"]
        over = {"longest": int(lengths.max()), "beyond": int((lengths > positions).sum())}
        beyond = {"model": positions, **over, "of": len(lengths)}
    kept = setup.policy and setup.policy.history
    moved, busy_s = asdict(measurement.traffic).items(), measurement.busy_seconds
    counts = access_summary(accesses, sum(setup.slots), setup.shape.layers)
    otherwise = counts["host"] and setup.testbed.mode == "measured"
    summary = {
        **counts,
        "lossless": None if otherwise else lossless,
        "lossless_note": ON_HOST if otherwise else None,
        "same_tokens": setup.log and setup.log.same_tokens,
        **{f"bytes_{kind}": round(count * larger) for kind, count in moved},
        "bytes_not_copied": counts["host"] * facts["expert_bytes"],
        "slot_budget_bytes": setup.budget_bytes,
        "peak_slot_bytes": measurement.peak_occupied * facts["expert_bytes"],
        "phase_seconds": asdict(measurement.phases),
        "busy_seconds": busy_s,
        "history_bytes": kept.memory_bytes() if kept else {},
        "history_entries": kept.counts() if kept else {},
        "bound": limit and {**asdict(limit), "times": limit.times(busy_s)},
        **latency_summary(requests, load.origin["dataset"]),
    }
    record = {
        "status": "complete",
        "mode": setup.testbed.mode,
        "testbed": setup.testbed.name,
        "system": cfg.system.label,
        "model": cfg.model.name,
        "weights": str(cfg.weights),
        "weights_fingerprint": fingerprint(cfg.model, str(cfg.weights), cfg.seed),
        **load.origin,
        "shared_prefix": load.shared_prefix(),
        "memory_budget_gb": None if setup.budget_bytes is None else setup.budget_bytes / 1e9,
        "slots": list(setup.slots),
        "time_scale": setup.testbed.time_scale,
        "seed": cfg.seed,
        "history": history,
        "prediction_costs": None,
        "online": setup.settings.arrivals(load, served, positions, cfg.seed),
        **facts,
        "positions": beyond,
        "summary": {**summary, **facts["summary"]},
        **records.provenance(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    return record, requests


def request_table(served: Sequence[Served], accesses: pd.DataFrame) -> pd.DataFrame:
    """Return one row per request.

    A batch shares its iterations, so the accesses of a request, by KINDS, are those of its batch;
    `batch` tells which requests share them. Online requests join and leave their batches: theirs
    are those of every iteration that served them, and `batch` is their order of starts.
    """
    counts = accesses[[*KINDS]]

    def row(one: Served) -> Facts:
        request = one.request
        waited = {"arrival_s": request.arrival, "queueing_s": one.queueing}
        return {
            "request": request.number,
            "batch": one.batch,
            "input_tokens": len(request.prompt),
            "output_tokens": len(one.tokens),
            **{f"{name}_s": getattr(one, name) for name in ("ttft", "tpot", "e2el")},
            **(waited if request.arrival is not None else {}),
            **counted(counts.reindex(one.iterations, fill_value=0)),
            "itl_s": one.itl,
            "tokens": list(one.tokens),
        }

    return pd.DataFrame(map(row, served))


def latency_summary(requests: pd.DataFrame, dataset: str) -> Facts:
    """Return mean, percentiles and bootstrap 95 % interval of TTFT, TPOT, ITL, E2EL and queueing.

    `requests` is a `request_table`. Seconds; None for a latency that no request has. All but TPOT
    and ITL count from the arrival, so that the queueing of online requests is part of them;
    offline, a request arrives when its prefill starts.
    """
    gaps = requests.explode("itl_s", ignore_index=True)
    summary: Facts = {}
    for name in ("ttft_s", "tpot_s", "itl_s", "e2el_s", "queueing_s"):
        rows = gaps if name == "itl_s" else requests
        values = rows[name].dropna().to_numpy(float) if name in rows else np.empty(0)
        summary[name] = None
        if len(values):
            percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
            ends = interval(request_draws(rows, name, dataset))
            of_ends = {"ci95": list(ends) if ends else None}
            summary[name] = {"mean": float(values.mean())} | percentiles | of_ends
    return summary
