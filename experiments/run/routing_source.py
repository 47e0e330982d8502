"""Where a simulated run's routing comes from: a given trace, or one recorded once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from baselines.on_demand import OnDemandPolicy
from experiments.run.config import build, online_settings, workload_settings
from experiments.run.console import Console
from experiments.run.datasets import Dataset, draw_prompts
from experiments.run.models import LoadedModel, load_model
from experiments.run.online import is_online, online, planned
from experiments.run.recording import Recording, trace_header
from experiments.run.records import check_writable
from experiments.run.serving import in_batches
from experiments.run.weights import fingerprint
from experiments.run.workloads import offline
from finemoe.assemble import resident_runtime
from finemoe.foreign_trace import ForeignTrace, is_foreign
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import ModelShape
from finemoe.trace import TraceReader

RECORDING_BATCH = 64
ONLINE_RECORDING_BATCH = 32
"""Smaller: requests of one batch are padded to the longest, which may be thousands of tokens."""


def open_routing(cfg: DictConfig, console: Console) -> TraceReader | ForeignTrace:
    """Open the trace that `routing` names, or the kept one of this model and workload.

    The latter is recorded first if it is not there. A table of activations alone, CSV or Parquet,
    will do for systems that predict nothing. Raises TraceError or UserError.
    """
    path = Path(cfg.routing) if cfg.routing else kept_trace(cfg, console)
    model = cfg.model
    shape = ModelShape(model.layers, model.experts, model.top_k, 0)
    if cfg.routing and is_foreign(path):
        return ForeignTrace(path, shape)
    reader = TraceReader(path)
    reader.require(shape=shape)
    return reader


def kept_trace(cfg: DictConfig, console: Console) -> Path:
    """Return the kept trace of these weights, dataset and workload; record it if it is missing."""
    path = _place(cfg)
    return path if path.exists() else _record(cfg, console)


def _place(cfg: DictConfig) -> Path:
    asked = {
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "weights": str(cfg.weights),
        "fingerprint": fingerprint(cfg.model, str(cfg.weights), cfg.seed),
        "dataset": OmegaConf.to_container(cfg.dataset, resolve=True),
        "seed": cfg.seed,
        **(_online_lengths(cfg) if is_online(cfg) else _offline_lengths(cfg)),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{cfg.model.name}-{cfg.dataset.name}-{digest}.parquet"
    return Path(cfg.traces) / name


def _offline_lengths(cfg: DictConfig) -> dict[str, Any]:
    settings = workload_settings(cfg.workload)
    return {
        "prompts": settings.prompts,
        "input_tokens": settings.input_tokens,
        "output_tokens": settings.output_tokens,
    }


def _online_lengths(cfg: DictConfig) -> dict[str, Any]:
    """Return the lengths alone: when requests arrive changes no routing."""
    plan = planned(online_settings(cfg.workload), cfg.seed)
    return {"online": [(one.input_tokens, one.output_tokens) for one in plan.arrivals]}


def _record(cfg: DictConfig, console: Console) -> Path:
    """Serve a workload's prompts with everything resident; return where their routing is kept."""
    check_writable(Path(cfg.traces), "traces")
    # A sum's last bits depend on the threads, and so would tokens that nearly tie.
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: LoadedModel = load_model(cfg.model, str(cfg.weights), device, cfg.seed)
    dataset: Dataset = build(cfg.dataset)
    prepare = _record_online if is_online(cfg) else _record_offline
    record = prepare(cfg, model, dataset)
    # Loading may have downloaded weights whose revision was not known before.
    path = _place(cfg)
    console.recording(path)
    # Runs of one sweep may record the same trace at the same time; the last one keeps its name.
    with resident_runtime(model.offloaded, OnDemandPolicy(model.offloaded.shape)) as runtime:
        record(runtime, path, console)
    return path


Record = Callable[[LiveRuntime, Path, Console], None]
"""Serves a workload through a runtime and writes its trace."""


def _record_offline(cfg: DictConfig, model: LoadedModel, dataset: Dataset) -> Record:
    settings = workload_settings(cfg.workload)
    drawn = settings.prompts, settings.input_tokens
    prompts = draw_prompts(dataset, model.tokenizer, *drawn, cfg.seed)
    load = offline(prompts, settings, cfg.seed)
    requests = (*load.history, *load.measured)

    def record(runtime: LiveRuntime, path: Path, console: Console) -> None:
        recording = Recording(runtime, trace_header(model, prompts, cfg.seed))
        batches = in_batches(requests, RECORDING_BATCH)
        recording.run(batches, len(requests), path, console)

    return record


def _record_online(cfg: DictConfig, model: LoadedModel, dataset: Dataset) -> Record:
    load = online(dataset, model.tokenizer, online_settings(cfg.workload), cfg.seed)
    prompts = load.prompt_set(dataset)

    def record(runtime: LiveRuntime, path: Path, console: Console) -> None:
        recording = Recording(runtime, trace_header(model, prompts, cfg.seed, load.passes))
        recording.run_continuously(load.requests, ONLINE_RECORDING_BATCH, path, console)

    return record
