"""One run: prepare the system's history, serve and measure, verify, record.

Offline protocol (section 6.1): a share of the prompts fills the system's history, served with
everything resident, which changes no routing; the others are measured, after the cache was warmed
by a few of the former.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from baselines.on_demand import OnDemandPolicy
from experiments.console import Advance, Console
from experiments.metrics import AccessCounter, latency_summary, request_table
from experiments.records import provenance, write_record
from experiments.serving import Served, Server, in_batches
from experiments.setup import Setup, free_bytes, prepare
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload.live import LiveRuntime, PhaseSeconds
from finemoe.offload.policy import Policy
from finemoe.offload.transfer import Traffic

Reference = list[list[Tensor]]
"""Logits (B, vocabulary) of every step of every measured batch."""


@dataclass
class Measurement:
    """What serving the measured requests left behind, over all repeats."""

    served: list[Served] = field(default_factory=list)
    accesses: AccessCounter = field(default_factory=AccessCounter)
    traffic: Traffic = field(default_factory=Traffic)
    phases: PhaseSeconds = field(default_factory=PhaseSeconds)
    peak_occupied: int = 0
    same_as_reference: bool | None = None
    """Whether every step's logits equal the reference's bit for bit; None if not verified."""


def run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Carry out one run and write its record; return the record. Raises UserError."""
    setup = prepare(cfg)
    console.announce(setup.testbed, setup.model, setup.prompts, setup.slots)
    history = build_history(setup, console)
    reference = reference_logits(setup, console)
    measurement = measure(setup, reference, console)
    record = {**make_record(setup, measurement), "history": history}
    requests = request_table(measurement.served, measurement.accesses)
    path = write_record(Path(cfg.output), record, requests)
    console.results(record, path, _sample(setup, measurement))
    return record


def build_history(setup: Setup, console: Console) -> str:
    """Serve the history prompts and save what they left; return how the history came about."""
    history = setup.workload.history
    served = "none"
    if setup.cfg.store.load:
        served = "loaded"
    elif setup.policy.placement.prediction != "none" and history:
        resident = _everything_fits(setup)
        served = "served with everything resident" if resident else "served under the budget"
        model = setup.model.offloaded
        runtime = (
            resident_runtime(model, setup.policy) if resident else _offloading(setup, setup.policy)
        )
        with runtime, console.progress("history", len(history)) as advance:
            server = Server(runtime)
            for batch in in_batches(history, setup.settings.history_batch_size):
                server.serve(batch)
                advance(len(batch))
            runtime.drain()
    if setup.cfg.store.save:
        # Before anything measured has been seen.
        setup.policy.save(Path(setup.cfg.store.save), setup.model.identity)
    setup.policy.begin_serving()
    return served


def reference_logits(setup: Setup, console: Console) -> Reference | None:
    """Return the logits of the measured requests with all experts resident, on the host."""
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
        for batch in in_batches(measured, setup.settings.batch_size):
            server.serve(batch)
            reference.append([logits.cpu() for logits in server.logits])
            advance(len(batch))
    return reference


def measure(setup: Setup, reference: Reference | None, console: Console) -> Measurement:
    """Serve warm-up and measured requests, as often as the config repeats them.

    Every repeat starts from the prepared policy and an empty cache.
    """
    load = setup.workload
    measurement = Measurement(same_as_reference=None if reference is None else True)
    total = (len(load.warmup) + len(load.measured)) * setup.settings.repeats
    with console.progress("serving", total) as advance:
        for _ in range(setup.settings.repeats):
            policy = copy.deepcopy(setup.policy)
            with _offloading(setup, policy) as runtime:
                _serve(setup, runtime, reference, measurement, advance)
    return measurement


def _serve(
    setup: Setup,
    runtime: LiveRuntime,
    reference: Reference | None,
    measurement: Measurement,
    advance: Advance,
) -> None:
    """Add one repeat to the measurement."""
    size = setup.settings.batch_size
    # Numbers go on where the last repeat ended, so that every batch and iteration has its own.
    numbered = measurement.served[-1] if measurement.served else None
    server = Server(runtime)
    if numbered:
        server.batches, server.iterations = numbered.batch + 1, numbered.iterations.stop
    for batch in in_batches(setup.workload.warmup, size):
        server.serve(batch)
        advance(len(batch))
    runtime.drain()
    runtime.listeners.append(measurement.accesses)
    before, runtime.phases = runtime.residency.traffic(), PhaseSeconds()
    for number, batch in enumerate(in_batches(setup.workload.measured, size)):
        measurement.served += server.serve(batch)
        if reference is not None and measurement.same_as_reference:
            pairs = zip(server.logits, reference[number], strict=True)
            measurement.same_as_reference = all(torch.equal(a.cpu(), b) for a, b in pairs)
        advance(len(batch))
    runtime.drain()
    measurement.traffic += runtime.residency.traffic() - before
    measurement.phases += runtime.phases
    occupied = runtime.residency.cache.peak_occupied
    measurement.peak_occupied = max(measurement.peak_occupied, occupied)


def _offloading(setup: Setup, policy: Policy) -> LiveRuntime:
    model = setup.model
    return offloading_runtime(
        model.offloaded, policy, setup.testbed, setup.slots, model.full_expert_bytes
    )


def _everything_fits(setup: Setup) -> bool:
    """Tell whether all experts fit the main device; on the CPU they are used where they lie."""
    offloaded = setup.model.offloaded
    if offloaded.device.type != "cuda":
        return True
    shape = offloaded.shape
    needed = shape.layers * shape.experts * offloaded.store.layout.nbytes
    return needed < 0.9 * free_bytes(offloaded.device)


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
