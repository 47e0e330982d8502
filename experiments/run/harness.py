"""One live run: prepare the system's history, serve and measure, verify, record.

Offline protocol (section 6.1): a share of the prompts fills the system's history, served with
everything resident, which changes no routing; the others are measured, after the cache was warmed
by a few of the former.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.config import build, check, learns
from experiments.run.console import Advance, Console
from experiments.run.first_pass import FirstPass, first_pass
from experiments.run.metrics import request_table
from experiments.run.online import is_online
from experiments.run.online_serving import prepare_online, run_live_online
from experiments.run.online_simulation import simulate_online
from experiments.run.recording import record_setup
from experiments.run.records import write_record
from experiments.run.run_record import Measurement, live_facts, run_record
from experiments.run.serving import in_batches
from experiments.run.setup import Setup, everything_fits, plain_runtime, prepare, under_budget
from experiments.run.simulation import simulate
from experiments.run.traced_serving import traced_setup
from experiments.run.zero_serving import run_zero
from finemoe.offload.bounds import Roofline, minimal_loads
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import PolicyError
from finemoe.offload.runtime import PhaseSeconds
from finemoe.offload.timeline import trace_events
from finemoe.testbed import SimulatedTestbed, Testbed


def run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Carry out one run, live or simulated, and write its record; return it. Raises UserError."""
    check(cfg)
    try:
        return _run(cfg, console)
    except PolicyError as error:
        raise UserError(str(error)) from error


def _run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    testbed = build(cfg.testbed)
    if cfg.routing and not isinstance(testbed, SimulatedTestbed):
        with traced_setup(cfg, testbed, console) as setup:
            return run_live(setup, console)
    if is_online(cfg):
        return _run_online(cfg, testbed, console)
    if cfg.system.get("runtime") == "deepspeed":
        return run_zero(cfg, testbed, console)
    if isinstance(testbed, SimulatedTestbed):
        return simulate(cfg, testbed, console)
    return run_live(prepare(cfg, testbed), console)


def _run_online(
    cfg: DictConfig, testbed: Testbed | SimulatedTestbed, console: Console
) -> dict[str, Any]:
    if isinstance(testbed, SimulatedTestbed):
        return simulate_online(cfg, testbed, console)
    return run_live_online(prepare_online(cfg, testbed), console)


def run_live(setup: Setup, console: Console) -> dict[str, Any]:
    """Serve with the real model and write the run's record; return it."""
    cfg = setup.cfg
    console.announce(setup.testbed, setup.model, setup.prompts, setup.slots)
    if cfg.record:
        record_setup(setup, Path(cfg.output) / "trace.parquet", console)
    history = build_history(setup, console)
    reference = first_pass(setup, console)
    measurement = measure(setup, reference, console)
    facts = live_facts(setup, setup.prompts, history, _bound(setup, reference))
    record = run_record(cfg, replace(facts, routing=setup.routing), measurement)
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
    elif learns(setup.policy) and history:
        fits = everything_fits(setup)
        served = "served with everything resident" if fits else "served under the budget"
        with (
            plain_runtime(setup, setup.policy) as runtime,
            console.progress("history", len(history)) as advance,
        ):
            server = setup.server(runtime)
            for batch in in_batches(history, setup.settings.history_batch_size):
                server.serve(batch)
                advance(len(batch))
            runtime.drain()
    if setup.cfg.store.save:
        # Before anything measured has been seen.
        assert setup.policy.history
        setup.policy.history.save(Path(setup.cfg.store.save), setup.model.identity)
    setup.policy.begin_serving()
    return served


def measure(setup: Setup, reference: FirstPass | None, console: Console) -> Measurement:
    """Serve warm-up and measured requests, as often as the config repeats them.

    Every repeat starts from the prepared policy and an empty cache.
    """
    load, repeats = setup.workload, setup.settings.repeats
    if reference is not None and setup.policy.set_future_routing:
        setup.policy.set_future_routing(reference.routing * repeats)
    verified = reference is not None and reference.logits is not None
    measurement = Measurement(same_as_reference=True if verified else None)
    total = (len(load.warmup) + len(load.measured)) * repeats
    with (
        trace_events(setup.cfg.output, setup.cfg.timeline) as timeline,
        console.progress("serving", total) as advance,
    ):
        for _ in range(repeats):
            policy = copy.deepcopy(setup.policy)
            with under_budget(setup, policy, timeline) as runtime:
                _serve(setup, runtime, reference, measurement, advance)
    return measurement


def _serve(
    setup: Setup,
    runtime: LiveRuntime,
    reference: FirstPass | None,
    measurement: Measurement,
    advance: Advance,
) -> None:
    """Add one repeat to the measurement."""
    size = setup.settings.batch_size
    # Numbers go on where the last repeat ended, so that every batch and iteration has its own.
    numbered = measurement.served[-1] if measurement.served else None
    server = setup.server(runtime)
    if numbered:
        server.batches, server.iterations = numbered.batch + 1, numbered.iterations[-1] + 1
    for batch in in_batches(setup.workload.warmup, size):
        server.serve(batch)
        advance(len(batch))
    runtime.drain()
    runtime.listeners.append(measurement.accesses)
    before, runtime.phases = runtime.residency.traffic(), PhaseSeconds()
    expected = reference.logits if reference is not None else None
    for number, batch in enumerate(in_batches(setup.workload.measured, size)):
        began = time.perf_counter()
        measurement.served += server.serve(batch)
        measurement.busy_seconds += time.perf_counter() - began
        if expected is not None and measurement.same_as_reference:
            pairs = zip(server.logits, expected[number], strict=True)
            measurement.same_as_reference = all(torch.equal(a.cpu(), b) for a, b in pairs)
        advance(len(batch))
    runtime.drain()
    measurement.traffic += runtime.residency.traffic() - before
    measurement.phases += runtime.phases
    occupied = runtime.residency.cache.peak_occupied
    measurement.peak_occupied = max(measurement.peak_occupied, occupied)


def _bound(setup: Setup, reference: FirstPass | None) -> Roofline | None:
    """Return the least time the measured requests could take; None without what it needs.

    A CUDA link's rate is not known beforehand, so there the bound is left to the simulation.
    """
    if reference is None or reference.compute_s is None or not setup.testbed.link_gb_s:
        return None
    shape, repeats = setup.model.offloaded.shape, setup.settings.repeats
    loads = minimal_loads(reference.routing, shape, setup.slots, reference.measured_from)
    link_s = max(loads) * setup.testbed.load_seconds(setup.model.full_expert_bytes)
    return Roofline(reference.compute_s * repeats, link_s * repeats)


def _sample(setup: Setup, measurement: Measurement) -> tuple[str, str]:
    """Return prompt and continuation of the first measured request, as text."""
    first = measurement.served[0]
    decode = setup.model.tokenizer.decode
    return decode(list(first.request.prompt)), decode(list(first.tokens))
