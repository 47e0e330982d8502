"""Where a simulated run's routing comes from: a given trace, or one recorded once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from baselines.on_demand import OnDemandPolicy
from experiments.console import Console
from experiments.datasets import draw_prompts
from experiments.errors import UserError
from experiments.models import LoadedModel, load_model
from experiments.recording import Recording, trace_header
from experiments.serving import in_batches
from experiments.setup import build, workload_settings
from experiments.workloads import offline
from finemoe.assemble import resident_runtime
from finemoe.offload.policy import ModelShape
from finemoe.trace_file import TraceReader

RECORDING_BATCH = 16


def open_routing(cfg: DictConfig, console: Console) -> TraceReader:
    """Open the trace that `routing` names, or the kept one of this model and workload.

    The latter is recorded first if it is not there. Raises TraceError or UserError.
    """
    path = Path(cfg.routing) if cfg.routing else kept_trace(cfg, console)
    reader = TraceReader(path)
    model = cfg.model
    shape = ModelShape(model.layers, model.experts, model.top_k, reader.header.shape.hidden_size)
    reader.require(shape=shape)
    return reader


def kept_trace(cfg: DictConfig, console: Console) -> Path:
    """Return the kept trace of this model, dataset and workload; record it if it is missing."""
    settings = workload_settings(cfg.workload)
    asked = {
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "weights": str(cfg.weights),
        "dataset": OmegaConf.to_container(cfg.dataset, resolve=True),
        "prompts": settings.prompts,
        "input_tokens": settings.input_tokens,
        "output_tokens": settings.output_tokens,
        "seed": cfg.seed,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{cfg.model.name}-{cfg.dataset.name}-{digest}.parquet"
    path = Path(cfg.traces) / name
    if not path.exists():
        _record(cfg, path, console)
    return path


def _record(cfg: DictConfig, path: Path, console: Console) -> None:
    """Serve all prompts of a workload with everything resident; keep what they routed."""
    settings = workload_settings(cfg.workload)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: LoadedModel = load_model(cfg.model, str(cfg.weights), device, cfg.seed)
    dataset: Any = build(cfg.dataset)
    drawn = settings.prompts, settings.input_tokens
    prompts = draw_prompts(dataset, model.tokenizer, *drawn, cfg.seed)
    load = offline(prompts, settings, cfg.seed)
    requests = (*load.history, *load.measured)
    console.recording(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent}: {error.strerror}; choose another traces="
        ) from error
    with resident_runtime(model.offloaded, OnDemandPolicy(model.offloaded.shape)) as runtime:
        header = trace_header(model, prompts, cfg.seed)
        # Runs of one sweep may record the same trace at the same time; each writes its own file.
        own = path.with_name(f"{path.stem}.{os.getpid()}.parquet")
        batches = in_batches(requests, RECORDING_BATCH)
        Recording(runtime, header).run(batches, len(requests), own, console)
    os.replace(own, path)
