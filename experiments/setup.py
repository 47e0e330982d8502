"""Everything a run needs, built from its config and checked before anything is served."""

from __future__ import annotations

import gc
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.datasets import PromptSet, draw_prompts
from experiments.errors import UserError
from experiments.models import LoadedModel, load_model
from experiments.workloads import OfflineSettings, OfflineWorkload, offline
from finemoe.expert_map import StoreMismatch
from finemoe.offload.budget import BudgetError, parse_budget, plan_slots
from finemoe.offload.policy import Policy
from finemoe.testbed import Testbed

DESCRIPTIONS = ("label", "lengths")
"""Keys of a config group's option that describe it and are no arguments of its target."""


@dataclass(frozen=True)
class Setup:
    """What one run consists of."""

    cfg: DictConfig
    testbed: Testbed
    model: LoadedModel
    prompts: PromptSet
    settings: OfflineSettings
    workload: OfflineWorkload
    policy: Policy
    slots: tuple[int, ...]
    budget_bytes: int


def prepare(cfg: DictConfig) -> Setup:
    """Build testbed, model, workload and policy; raise UserError for anything that cannot be."""
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: give a whole number from 0")
    settings = _workload_settings(cfg.workload)
    testbed: Testbed = build(cfg.testbed)
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    model = load_model(cfg.model, str(cfg.weights), testbed.devices[0], cfg.seed)
    shape = model.offloaded.shape
    policy: Policy = build(cfg.system, shape=shape)
    dataset = build(cfg.dataset)
    drawn = settings.prompts, settings.input_tokens
    prompts = draw_prompts(dataset, model.tokenizer, *drawn, cfg.seed)
    workload = offline(prompts, settings, cfg.seed)
    try:
        asked = "100%" if policy.placement.everything_resident else cfg.memory_budget
        budget = parse_budget(asked, model.full_expert_bytes, shape)
        slots = plan_slots(budget, model.full_expert_bytes, shape, len(testbed.devices))
    except BudgetError as error:
        raise UserError(f"{error}") from error
    _check_room(testbed, model, slots)
    setup = Setup(cfg, testbed, model, prompts, settings, workload, policy, slots, budget)
    _check_store(setup)
    return setup


def build(cfg: DictConfig, **arguments: Any) -> Any:
    """Call the target of a config group's option.

    Raises UserError for a value or a key that the target refuses.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {k: v for k, v in plain.items() if k not in DESCRIPTIONS}
    try:
        return instantiate(settings, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError | ValueError | KeyError | TypeError):
            raise UserError(f"{plain['_target_']}: {error.__cause__}") from error
        raise


def free_bytes(device: torch.device) -> int:
    """Return how much more a device can hold, after what nobody uses any more was given back."""
    gc.collect()
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _workload_settings(cfg: DictConfig) -> OfflineSettings:
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(OfflineSettings), plain)
        settings: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"workload: {str(error).splitlines()[0]}") from error
    for name in ("prompts", "input_tokens", "output_tokens", "batch_size", "repeats"):
        if getattr(settings, name) < 1:
            raise UserError(f"workload.{name}={getattr(settings, name)}: it starts at 1")
    if settings.history_batch_size < 1 or settings.warmup < 0:
        raise UserError("workload.history_batch_size starts at 1, workload.warmup at 0")
    return settings


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


def _check_store(setup: Setup) -> None:
    """Load the store that the config names, and make sure that one can be saved."""
    load, save = setup.cfg.store.load, setup.cfg.store.save
    if (load or save) and setup.policy.placement.prediction == "none":
        raise UserError(f"system={setup.cfg.system.label} keeps no store to load or save")
    if load:
        try:
            setup.policy.load(Path(load), setup.model.identity)
        except StoreMismatch as error:
            raise UserError(f"{error}; give a store saved for this model, or none") from error
    if save:
        try:
            Path(save).parent.mkdir(parents=True, exist_ok=True)
            setup.policy.save(Path(save), setup.model.identity)
        except OSError as error:
            raise UserError(
                f"cannot write {save}: {error.strerror}; choose another file"
            ) from error
