"""Everything a run needs, built from its config and checked before anything is served."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run.config import budget_slots, build, load_store, workload_settings
from experiments.run.datasets import PromptSet, draw_prompts
from experiments.run.models import LoadedModel, load_model
from experiments.run.serving import Runtime, Server
from experiments.run.workloads import OfflineSettings, OfflineWorkload, offline
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import Policy
from finemoe.offload.timeline import Timeline
from finemoe.recorder import gate_weights
from finemoe.testbed import Testbed


@dataclass(frozen=True)
class Engine:
    """What serves in a live run, whatever is served."""

    cfg: DictConfig
    testbed: Testbed
    model: LoadedModel
    policy: Policy
    slots: tuple[int, ...]
    budget_bytes: int


@dataclass(frozen=True)
class Setup(Engine):
    """What one live offline run consists of."""

    prompts: PromptSet
    settings: OfflineSettings
    workload: OfflineWorkload
    server: Callable[[Runtime], Server] = Server
    """Makes what serves through a runtime."""
    routing: str = "the model's own gates"
    """Where the routing comes from, in words."""


def prepare(cfg: DictConfig, testbed: Testbed) -> Setup:
    """Build model, workload and policy; raise UserError for anything that cannot be."""
    settings = workload_settings(cfg.workload)
    engine = prepare_engine(cfg, testbed)
    prompts, workload = draw_workload(cfg, settings, engine.model.tokenizer)
    load_store(cfg, engine.policy, engine.model.identity)
    return Setup(**vars(engine), prompts=prompts, settings=settings, workload=workload)


def prepare_engine(cfg: DictConfig, testbed: Testbed) -> Engine:
    """Load the model and build the policy; raise UserError for anything that cannot be."""
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    model = load_model(cfg.model, str(cfg.weights), testbed.devices[0], cfg.seed)
    shape = model.offloaded.shape
    policy: Policy = build(cfg.system, shape=shape)
    if policy.set_gates:
        policy.set_gates(gate_weights(model.offloaded))
    full = model.full_expert_bytes
    budget, slots = budget_slots(cfg, policy, full, shape, len(testbed.devices))
    _check_room(testbed, model, slots)
    return Engine(cfg, testbed, model, policy, slots, budget)


def draw_workload(
    cfg: DictConfig, settings: OfflineSettings, tokenizer: Any
) -> tuple[PromptSet, OfflineWorkload]:
    """Return the prompts of a run, and which of them are measured; raise UserError."""
    dataset = build(cfg.dataset)
    prompts = draw_prompts(dataset, tokenizer, settings.prompts, settings.input_tokens, cfg.seed)
    return prompts, offline(prompts, settings, cfg.seed)


def free_bytes(device: torch.device) -> int:
    """Return how much more a device can hold, after what nobody uses any more was given back."""
    gc.collect()
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def everything_fits(engine: Engine) -> bool:
    """Tell whether all experts fit the main device; on the CPU they are used where they lie."""
    offloaded = engine.model.offloaded
    if offloaded.device.type != "cuda":
        return True
    shape = offloaded.shape
    needed = shape.layers * shape.experts * offloaded.store.layout.nbytes
    return needed < 0.9 * free_bytes(offloaded.device)


def under_budget(engine: Engine, policy: Policy, timeline: Timeline | None = None) -> LiveRuntime:
    """Return a runtime that serves under the memory budget."""
    model = engine.model
    full = model.full_expert_bytes
    return offloading_runtime(model.offloaded, policy, engine.testbed, engine.slots, full, timeline)


def plain_runtime(engine: Engine, policy: Policy | None = None) -> LiveRuntime:
    """Return a runtime with everything resident if that fits, else one under the budget."""
    offloaded = engine.model.offloaded
    policy = policy or OnDemandPolicy(offloaded.shape)
    if everything_fits(engine):
        return resident_runtime(offloaded, policy)
    return under_budget(engine, policy)


def _check_room(testbed: Testbed, model: LoadedModel, slots: tuple[int, ...]) -> None:
    needed: Counter[torch.device] = Counter()
    for device, count in zip(testbed.devices, slots, strict=True):
        needed[device] += count * model.offloaded.store.layout.nbytes
    for device, asked in needed.items():
        free = free_bytes(device)
        if asked > free:
            raise UserError(
                f"the memory budget puts {asked / 1e9:.1f} GB of experts on {device}, which has "
                f"{free / 1e9:.1f} GB free; lower memory_budget"
            )
