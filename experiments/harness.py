"""One run: load, prepare the system's history, serve and measure, verify, record.

Offline protocol (section 6.1): a share of the prompts fills the system's history, served with
everything resident, which changes no routing; the others are measured from a cold cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from baselines.on_demand import OnDemandPolicy
from experiments.console import Console
from experiments.datasets import PromptSet, draw_prompts
from experiments.errors import UserError
from experiments.metrics import AccessCounter, latency_summary, request_table
from experiments.models import LoadedModel, load_model
from experiments.records import provenance, write_record
from experiments.serving import Served, Server, in_batches
from experiments.workloads import OfflineWorkload, Request, offline
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.expert_map import StoreMismatch
from finemoe.offload.budget import BudgetError, parse_budget, plan_slots
from finemoe.offload.live import LiveRuntime, PhaseSeconds
from finemoe.offload.policy import Policy
from finemoe.offload.transfer import Traffic
from finemoe.testbed import Testbed


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, built and checked before anything is served."""

    cfg: DictConfig
    testbed: Testbed
    model: LoadedModel
    prompts: PromptSet
    workload: OfflineWorkload
    policy: Policy
    slots: tuple[int, ...]
    budget_bytes: int


@dataclass(frozen=True)
class Measurement:
    """What serving the measured requests left behind."""

    served: tuple[Served, ...]
    accesses: AccessCounter
    traffic: Traffic
    phases: PhaseSeconds
    peak_occupied: int
    same_as_reference: bool | None
    """Whether every step's logits equal the reference's bit for bit; None if not verified."""


def run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Carry out one run and write its record; return the record. Raises UserError."""
    setup = prepare(cfg)
    console.announce(setup.testbed, setup.model, setup.prompts, setup.slots)
    _build_history(setup, console)
    # Saved before anything measured has been seen.
    _save_history(setup)
    reference = _reference_logits(setup, console)
    measurement = _measure(setup, reference, console)
    record = make_record(setup, measurement)
    requests = request_table(measurement.served, measurement.accesses)
    path = write_record(Path(cfg.output), record, requests)
    console.results(record, path, _sample(setup, measurement))
    return record


def prepare(cfg: DictConfig) -> Setup:
    """Build testbed, model, workload and policy; raise UserError for anything that cannot be."""
    testbed: Testbed = _build(cfg.testbed)
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    torch.manual_seed(cfg.seed)
    model = load_model(cfg.model, str(cfg.weights), testbed.devices[0], cfg.seed)
    shape = model.offloaded.shape
    policy: Policy = _build(cfg.system, shape=shape)
    load = cfg.workload
    dataset = _build(cfg.dataset)
    prompts = draw_prompts(dataset, model.tokenizer, load.prompts, load.input_tokens, cfg.seed)
    workload = offline(prompts, load.history_share, load.output_tokens, cfg.seed)
    if min(load.batch_size, load.history_batch_size, load.repeats) < 1 or load.warmup < 0:
        raise UserError("batch_size, history_batch_size and repeats start at 1, warmup at 0")
    try:
        asked = "100%" if policy.placement.everything_resident else cfg.memory_budget
        budget = parse_budget(asked, model.full_expert_bytes, shape)
        slots = plan_slots(budget, model.full_expert_bytes, shape, len(testbed.devices))
    except BudgetError as error:
        raise UserError(f"{error}") from error
    _check_device_room(testbed, model, slots)
    setup = Setup(cfg, testbed, model, prompts, workload, policy, slots, budget)
    if cfg.store.load:
        _load_history(setup)
    return setup


def _build(cfg: DictConfig, **arguments: Any) -> Any:
    """Call the target of a config group's option, without the keys that only describe it.

    Raises UserError for a value that the target refuses.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {k: v for k, v in plain.items() if k not in ("label", "lengths")}
    try:
        return instantiate(settings, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError | ValueError):
            raise UserError(str(error.__cause__)) from error
        raise


def _check_device_room(testbed: Testbed, model: LoadedModel, slots: tuple[int, ...]) -> None:
    for device, count in zip(testbed.devices, slots, strict=True):
        if device.type != "cuda":
            continue
        free, _ = torch.cuda.mem_get_info(device)
        needed = count * model.offloaded.store.layout.nbytes
        if needed > free:
            raise UserError(
                f"the memory budget puts {needed / 1e9:.1f} GB of experts on {device}, which has "
                f"{free / 1e9:.1f} GB free; lower memory_budget"
            )


# History ---------------------------------------------------------------------------------------


def _observes(policy: Policy) -> bool:
    return policy.placement.prediction != "none"


def _everything_fits(setup: Setup) -> bool:
    device = setup.model.offloaded.device
    if device.type != "cuda":
        return True
    shape = setup.model.offloaded.shape
    needed = shape.layers * shape.experts * setup.model.offloaded.store.layout.nbytes
    return bool(needed < 0.9 * torch.cuda.mem_get_info(device)[0])


def _build_history(setup: Setup, console: Console) -> None:
    """Serve the history prompts, unless a store was loaded or the system keeps none."""
    history = setup.workload.history
    if _observes(setup.policy) and history and not setup.cfg.store.load:
        runtime = (
            resident_runtime(setup.model.offloaded, setup.policy)
            if _everything_fits(setup)
            else _offloading(setup)
        )
        size = setup.cfg.workload.history_batch_size
        with runtime, console.progress("history", len(history)) as advance:
            server = Server(runtime)
            for batch in in_batches(history, size):
                server.serve(batch)
                advance(len(batch))
            runtime.drain()
    setup.policy.begin_serving()


def _load_history(setup: Setup) -> None:
    try:
        setup.policy.load(Path(setup.cfg.store.load), setup.model.identity)
    except StoreMismatch as error:
        raise UserError(f"{error}; give a store saved for this model, or none") from error
    except NotImplementedError:
        raise UserError(f"system={setup.cfg.system.label} keeps no store to load") from None


def _save_history(setup: Setup) -> None:
    if setup.cfg.store.save:
        target = Path(setup.cfg.store.save)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            setup.policy.save(target, setup.model.identity)
        except NotImplementedError:
            raise UserError(f"system={setup.cfg.system.label} keeps no store to save") from None


# Serving ---------------------------------------------------------------------------------------


def _offloading(setup: Setup) -> LiveRuntime:
    return offloading_runtime(
        setup.model.offloaded,
        setup.policy,
        setup.testbed,
        setup.slots,
        setup.model.full_expert_bytes,
    )


def _reference_logits(setup: Setup, console: Console) -> list[list[Tensor]] | None:
    """Return the logits of every step of every measured batch with all experts resident."""
    if not setup.cfg.verify or not _everything_fits(setup):
        return None
    offloaded = setup.model.offloaded
    measured = setup.workload.measured
    reference = []
    with (
        resident_runtime(offloaded, OnDemandPolicy(offloaded.shape)) as runtime,
        console.progress("reference", len(measured)) as advance,
    ):
        server = Server(runtime)
        for batch in in_batches(measured, setup.cfg.workload.batch_size):
            server.serve(batch)
            reference.append([logits.cpu() for logits in server.logits])
            advance(len(batch))
    return reference


def _measure(setup: Setup, reference: list[list[Tensor]] | None, console: Console) -> Measurement:
    load = setup.cfg.workload
    warmup = _cycled(setup.workload.history or setup.workload.measured, load.warmup)
    batches = list(in_batches(setup.workload.measured, load.batch_size)) * load.repeats
    served: list[Served] = []
    same = None if reference is None else True
    requests = load.warmup + sum(len(batch) for batch in batches)
    with _offloading(setup) as runtime, console.progress("serving", requests) as advance:
        server = Server(runtime)
        for batch in in_batches(warmup, load.batch_size):
            server.serve(batch)
            advance(len(batch))
        runtime.drain()
        counter = AccessCounter()
        runtime.listeners.append(counter)
        traffic_before, runtime.phases = runtime.residency.traffic(), PhaseSeconds()
        for number, batch in enumerate(batches):
            served += server.serve(batch)
            if reference is not None:
                expected = reference[number % len(reference)]
                pairs = zip(server.logits, expected, strict=True)
                same = same and all(torch.equal(a.cpu(), b) for a, b in pairs)
            advance(len(batch))
        runtime.drain()
        traffic = runtime.residency.traffic() - traffic_before
        peak = runtime.residency.cache.peak_occupied
        return Measurement(tuple(served), counter, traffic, runtime.phases, peak, same)


def _cycled(requests: Sequence[Request], count: int) -> list[Request]:
    return [requests[i % len(requests)] for i in range(count)]


# Record ----------------------------------------------------------------------------------------


def make_record(setup: Setup, measurement: Measurement) -> dict[str, Any]:
    """Return the run record; bytes are those of full-size experts, times are in seconds."""
    cfg, model = setup.cfg, setup.model
    stored, full = model.offloaded.store.layout.nbytes, model.full_expert_bytes
    traffic = {
        f"bytes_{kind}": round(count * full / stored)
        for kind, count in asdict(measurement.traffic).items()
    }
    summary = {
        **latency_summary(measurement.served, cfg.seed),
        **measurement.accesses.summary(),
        "lossless": measurement.same_as_reference,
        **traffic,
        "peak_slot_bytes": measurement.peak_occupied * full,
        "slot_budget_bytes": setup.budget_bytes,
        "dense_bytes": model.offloaded.dense_bytes,
        "history_bytes": setup.policy.memory_bytes(),
        "phase_seconds": asdict(measurement.phases),
    }
    return {
        "status": "complete",
        "mode": setup.testbed.mode,
        "testbed": setup.testbed.name,
        "system": cfg.system.label,
        "model": model.name,
        "weights": model.weights,
        "routing": "the model's own gates",
        "dataset": setup.prompts.dataset,
        "dataset_source": setup.prompts.source,
        "dataset_sha256": setup.prompts.sha256,
        "memory_budget_gb": setup.budget_bytes / 1e9,
        "slots": list(setup.slots),
        "expert_bytes": full,
        "stored_expert_bytes": stored,
        "time_scale": setup.testbed.time_scale,
        "seed": cfg.seed,
        "summary": summary,
        **provenance(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }


def _sample(setup: Setup, measurement: Measurement) -> tuple[str, str]:
    """Return prompt and continuation of the first measured request, as text."""
    first = measurement.served[0]
    decode = setup.model.tokenizer.decode
    return decode(list(first.request.prompt)), decode(list(first.tokens))
