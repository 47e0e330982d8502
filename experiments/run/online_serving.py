"""One live online run: requests arrive in real time at a system that has seen nothing before.

Stores start empty and grow (section 6.1); nothing is served before the first request arrives. What
is in a batch depends on how fast the system serves, so losslessness is verified afterwards: the
very same batches go through the model with every expert resident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.errors import UserError
from experiments.run.config import build, load_store, online_settings
from experiments.run.console import Console
from experiments.run.continuous import ContinuousServer, ServedOnline, Step
from experiments.run.datasets import Dataset, PromptSet
from experiments.run.metrics import request_table
from experiments.run.online import OnlineSettings, OnlineWorkload, online
from experiments.run.recording import Recording, trace_header
from experiments.run.records import write_record
from experiments.run.run_record import Measurement, live_facts, run_record
from experiments.run.setup import (
    Engine,
    everything_fits,
    plain_runtime,
    prepare_engine,
    under_budget,
)
from finemoe.offload.timeline import trace_events
from finemoe.testbed import Testbed


@dataclass(frozen=True)
class OnlineSetup(Engine):
    """What one live online run consists of."""

    prompts: PromptSet
    settings: OnlineSettings
    workload: OnlineWorkload


def prepare_online(cfg: DictConfig, testbed: Testbed) -> OnlineSetup:
    """Build model, workload and policy; raise UserError for anything that cannot be."""
    settings = online_settings(cfg.workload)
    check_store(cfg)
    engine = prepare_engine(cfg, testbed)
    dataset: Dataset = build(cfg.dataset)
    workload = online(dataset, engine.model.tokenizer, settings, cfg.seed)
    load_store(cfg, engine.policy, engine.model.identity)
    return OnlineSetup(
        **vars(engine),
        prompts=workload.prompt_set(dataset),
        settings=settings,
        workload=workload,
    )


def check_store(cfg: DictConfig) -> None:
    """Raise UserError if a store is to be saved: there is no history that would fill one."""
    if cfg.store.save:
        raise UserError("store.save keeps what history prompts left; use workload=offline for it")


def run_live_online(setup: OnlineSetup, console: Console) -> dict[str, Any]:
    """Serve with the real model and write the run's record; return it."""
    cfg = setup.cfg
    console.announce(setup.testbed, setup.model, setup.prompts, setup.slots)
    if cfg.record:
        _record_routing(setup, Path(cfg.output) / "trace.parquet", console)
    served, measurement = measure(setup, console)
    facts = live_facts(
        setup,
        setup.prompts,
        "loaded" if cfg.store.load else "none",
        online=online_facts(setup.settings, setup.workload, served, setup.model.positions),
    )
    record = run_record(cfg, facts, measurement)
    requests = request_table(served, measurement.accesses)
    path = write_record(Path(cfg.output), record, requests)
    console.results(record, path, None)
    return record


def measure(setup: OnlineSetup, console: Console) -> tuple[Sequence[ServedOnline], Measurement]:
    """Serve the requests as they arrive, then compare every logit if that is asked for."""
    setup.policy.begin_serving()
    verify = bool(setup.cfg.verify) and everything_fits(setup)
    measurement, logits = Measurement(), list[Tensor]()
    total = len(setup.workload.requests)
    with (
        trace_events(setup.cfg.output, setup.cfg.timeline) as timeline,
        under_budget(setup, setup.policy, timeline) as runtime,
        console.progress("serving", total) as advance,
    ):
        before = runtime.residency.traffic()
        runtime.listeners.append(measurement.accesses)
        server = ContinuousServer(runtime, setup.settings.max_batch_size)
        server.listeners.append(lambda step, _: advance(len(step.leaving)))
        if verify:
            server.listeners.append(lambda _, computed: logits.append(computed.cpu()))
        served = server.serve(setup.workload.requests)
        runtime.drain()
        measurement.served += served
        measurement.busy_seconds = server.busy_seconds
        measurement.traffic = runtime.residency.traffic() - before
        measurement.phases = runtime.phases
        measurement.peak_occupied = runtime.residency.cache.peak_occupied
    if verify:
        measurement.same_as_reference = same_logits(setup, server.steps, logits, console)
    return served, measurement


def same_logits(
    setup: OnlineSetup, steps: Sequence[Step], logits: Sequence[Tensor], console: Console
) -> bool:
    """Repeat the steps with every expert resident; tell whether all logits are the same bits.

    `logits` holds those of each step, shape (B, vocabulary), on the host.
    """
    expected = iter(logits)
    same: list[bool] = []
    with (
        plain_runtime(setup) as runtime,
        console.progress("verifying", len(steps)) as advance,
    ):
        server = ContinuousServer(runtime, setup.settings.max_batch_size)
        server.listeners.append(
            lambda _, computed: same.append(torch.equal(computed.cpu(), next(expected)))
        )
        for step in steps:
            server.carry_out(step)
            advance(1)
    return all(same)


def online_facts(
    settings: OnlineSettings,
    workload: OnlineWorkload,
    served: Sequence[ServedOnline],
    max_positions: int | None,
) -> dict[str, Any]:
    """Return what a record says of an online workload; rates are in requests a second.

    `positions_beyond` counts requests that are longer than the `max_positions` that the model was
    made for. Those are served nevertheless: rotary embeddings go on.
    """
    arrivals = [one.arrival for one in workload.requests]
    ends = [one.request.arrival + one.e2el for one in served]
    beyond = None
    if max_positions is not None:
        lengths = [len(one.prompt) + one.output_tokens for one in workload.requests]
        beyond = sum(length > max_positions for length in lengths)
    span = max(arrivals) - min(arrivals)
    return {
        "requests": len(workload.requests),
        "source": workload.source,
        "arrival": settings.arrival,
        "sha256": workload.sha256,
        "passes": workload.passes,
        "max_batch_size": settings.max_batch_size,
        "max_input_tokens": settings.max_input_tokens,
        "max_output_tokens": settings.max_output_tokens,
        "shortened": workload.shortened,
        "max_positions": max_positions,
        "positions_beyond": beyond,
        "rate": settings.rate,
        "realised_rate": (len(arrivals) - 1) / span if span else None,
        "served_rate": len(served) / max(ends),
    }


def _record_routing(setup: OnlineSetup, path: Path, console: Console) -> None:
    with plain_runtime(setup) as runtime:
        passes = setup.workload.passes
        header = trace_header(setup.model, setup.prompts, setup.cfg.seed, passes)
        recording = Recording(runtime, header)
        requests, size = setup.workload.requests, setup.settings.max_batch_size
        recording.run_continuously(requests, size, path, console)
