"""Routing traces of runs: recorded while a model serves, and kept for every later replay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run.config import build, values_of
from experiments.run.console import Console
from experiments.run.models import LoadedModel, load_model
from experiments.run.records import check_writable, provenance
from experiments.run.room import free_bytes
from experiments.run.schedule import Schedule, Server
from experiments.run.testbeds import local
from experiments.run.weights import fingerprint
from experiments.run.workloads import Workload, WorkloadSettings
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.foreign_trace import STREAMS, ForeignTrace, RoutedStream, is_foreign
from finemoe.offload.budget import BudgetError, plan_slots
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import ModelShape
from finemoe.recorder import Recorder, gate_weights
from finemoe.testbed import cuda_devices
from finemoe.trace import CONTENTS, Trace, TraceHeader, TraceReader, trace_writer

SHARE = 0.8
"""Of a GPU's free memory that experts may take while routing is recorded."""


def open_routing(cfg: DictConfig, console: Console) -> Trace:
    """Open the trace that `routing` names, or the kept one of this model and workload.

    The latter is recorded first if it is not there. A table of activations alone, CSV or Parquet,
    will do for systems that predict nothing. Raises TraceError or UserError.
    """
    path = Path(cfg.routing) if cfg.routing else kept_trace(cfg, console)
    shape = ModelShape(cfg.model.layers, cfg.model.experts, cfg.model.top_k, 0)
    if cfg.routing and path.suffix in STREAMS:
        load = cfg.workload
        lengths = load.get("input_tokens") or 1, load.get("output_tokens") or 1
        return RoutedStream(path, shape, *lengths)
    if cfg.routing and is_foreign(path):
        return ForeignTrace(path, shape)
    reader = TraceReader(path)
    reader.require(shape=shape)
    return reader


def kept_trace(cfg: DictConfig, console: Console) -> Path:
    """Return the kept trace of these weights, dataset and workload; record it if it is missing."""
    settings: WorkloadSettings = build(cfg.workload)
    path = _path(cfg, settings)
    if path.exists():
        return path
    check_writable(Path(cfg.traces), "traces")
    # A sum's last bits depend on the threads, and so would tokens that nearly tie.
    torch.set_num_threads(1)
    device = torch.device("cuda:0" if cuda_devices() else "cpu")
    model = load_model(cfg.model, str(cfg.weights), device, cfg.seed)
    load = settings.draw(build(cfg.dataset), model.tokenizer, cfg.seed)
    # Loading may have downloaded weights whose revision was not known before.
    path = _path(cfg, settings)
    console.announce([f"recording the routing once, to {path}"])
    # Runs of one sweep may record the same trace at the same time; the last one keeps its name.
    with _recording_runtime(model.offloaded) as runtime:
        record(runtime, model, load, [settings.recording(load)], cfg.seed, path, console)
    return path


def _recording_runtime(model: OffloadedModel) -> LiveRuntime:
    """Return a runtime with as many experts resident as the CUDA devices hold, or all on the CPU.

    Raises UserError if not even a token's experts fit.
    """
    policy, nbytes = OnDemandPolicy(model.shape), model.store.layout.nbytes
    if model.device.type != "cuda":
        return resident_runtime(model, policy)
    testbed = local(None, None)
    each = min(int(SHARE * free_bytes(device)) // nbytes for device in testbed.devices)
    count = len(testbed.devices)
    try:
        slots = plan_slots(each * count * nbytes, nbytes, model.shape, count)
    except BudgetError as error:
        cause = f"the GPUs cannot hold a token's experts: {error}"
        raise UserError(f"{cause}; record on a larger one, or give routing=") from error
    return offloading_runtime(model, policy, testbed, slots, nbytes)


def _path(cfg: DictConfig, settings: WorkloadSettings) -> Path:
    model = values_of(cfg.model)
    # Routing does not depend on them.
    for name in ("prefetch_distance", "facts"):
        model.pop(name, None)
    asked = {
        "model": model,
        "weights": str(cfg.weights),
        "fingerprint": fingerprint(cfg.model, str(cfg.weights), cfg.seed),
        "dataset": values_of(cfg.dataset),
        "seed": cfg.seed,
        **settings.lengths(cfg.seed),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cfg.traces) / f"{cfg.model.name}-{cfg.dataset.name}-{digest}.parquet"


def record(
    runtime: LiveRuntime,
    model: LoadedModel,
    load: Workload,
    schedules: Iterable[Schedule],
    seed: int,
    path: Path,
    console: Console,
) -> None:
    """Serve schedules and write what each request routed; the file appears when complete."""
    from experiments.run.live import LiveBackend

    progress = console.progress("recording", len(load.history) + len(load.measured))
    with ExitStack() as stack, Recorder(runtime.model) as recorder, progress as advance:
        server = Server(LiveBackend(runtime, before=lambda step: recorder.begin(step.iteration)))
        write = None
        for one in chain.from_iterable(map(server.serve, schedules)):
            if write is None:
                # Gates may compute in a wider dtype than the model's, which is known by now.
                header = trace_header(model, load, seed, recorder.dtype)
                write = stack.enter_context(trace_writer(path, header))
            write(recorder.finish(one.request.number, one.request.prompt, one.tokens))
            advance(1)


def trace_header(model: LoadedModel, load: Workload, seed: int, dtype: Any) -> TraceHeader:
    """Return the header of a trace of a workload's requests."""
    origin = {
        "model": model.name,
        "weights": model.weights,
        "dataset": load.prompts.dataset,
        "dataset_source": load.prompts.source,
        "dataset_sha256": load.prompts.sha256,
        "seed": seed,
        "dense_bytes": model.offloaded.dense_bytes,
        "passes": load.passes,
        "positions": model.positions,
        "cast": model.cast,
        **provenance(),
    }
    gates = None
    with suppress(ValueError):  # Who applies them to hidden states has no use for such a trace.
        gates = gate_weights(model.offloaded)
    return TraceHeader(model.offloaded.shape, dtype, CONTENTS, origin, gates)
