"""Everything a run needs, built from its config and checked before anything is served."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from baselines.on_demand import OnDemandPolicy
from experiments.datasets import PromptSet, draw_prompts
from experiments.errors import UserError
from experiments.models import LoadedModel, load_model
from experiments.online import OnlineSettings
from experiments.online import check as check_online
from experiments.serving import Runtime, Server
from experiments.workloads import OfflineSettings, OfflineWorkload, offline
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.expert_map import StoreMismatch
from finemoe.offload.budget import BudgetError, parse_budget, plan_slots
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import ModelShape, Policy
from finemoe.offload.timeline import Timeline
from finemoe.recorder import gate_weights
from finemoe.testbed import Testbed

S = TypeVar("S")

DESCRIPTIONS = ("label", "lengths", "runtime")
"""Keys of a config group's option that describe it and are no arguments of its target."""


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
    check_seed(cfg)
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    model = load_model(cfg.model, str(cfg.weights), testbed.devices[0], cfg.seed)
    shape = model.offloaded.shape
    policy: Policy = build(cfg.system, shape=shape)
    if policy.placement.hidden_states:
        policy.set_gates(gate_weights(model.offloaded))
    full = model.full_expert_bytes
    budget, slots = budget_slots(cfg, policy, full, shape, len(testbed.devices))
    _check_room(testbed, model, slots)
    return Engine(cfg, testbed, model, policy, slots, budget)


def check_seed(cfg: DictConfig) -> None:
    """Raise UserError for a seed that cannot be."""
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: give a whole number from 0")


def draw_workload(
    cfg: DictConfig, settings: OfflineSettings, tokenizer: Any
) -> tuple[PromptSet, OfflineWorkload]:
    """Return the prompts of a run, and which of them are measured; raise UserError."""
    dataset = build(cfg.dataset)
    prompts = draw_prompts(dataset, tokenizer, settings.prompts, settings.input_tokens, cfg.seed)
    return prompts, offline(prompts, settings, cfg.seed)


def budget_slots(
    cfg: DictConfig, policy: Policy, expert_bytes: int, shape: ModelShape, devices: int
) -> tuple[int, tuple[int, ...]]:
    """Return the memory budget in bytes and the slots of each device; raise UserError."""
    try:
        asked = "100%" if policy.placement.everything_resident else cfg.memory_budget
        budget = parse_budget(asked, expert_bytes, shape)
        return budget, plan_slots(budget, expert_bytes, shape, devices)
    except BudgetError as error:
        raise UserError(f"{error}") from error


def build(cfg: DictConfig, **arguments: Any) -> Any:
    """Call the target of a config group's option.

    Raises UserError for a value or a key that the target refuses.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {k: v for k, v in plain.items() if k not in DESCRIPTIONS}
    try:
        # Hydra would turn arguments that are dataclasses into configs, which are slow to read.
        return instantiate(settings, _partial_=True)(**arguments)
    except (InstantiationException, ValueError, KeyError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, ValueError | KeyError | TypeError):
            raise UserError(f"{plain['_target_']}: {cause}") from error
        if isinstance(cause, ImportError):
            told = f"{plain['_target_']} cannot be imported ({cause.__cause__ or cause})"
            raise UserError(f"{told}; set PYTHONPATH to the folder of its module") from error
        raise


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


def workload_settings(cfg: DictConfig) -> OfflineSettings:
    """Return what an offline workload says; raise UserError for values that cannot be."""
    settings = _settings(cfg, OfflineSettings)
    for name in ("prompts", "input_tokens", "output_tokens", "batch_size", "repeats"):
        if getattr(settings, name) < 1:
            raise UserError(f"workload.{name}={getattr(settings, name)}: it starts at 1")
    if settings.history_batch_size < 1 or settings.warmup < 0:
        raise UserError("workload.history_batch_size starts at 1, workload.warmup at 0")
    return settings


def online_settings(cfg: DictConfig) -> OnlineSettings:
    """Return what an online workload says; raise UserError for values that cannot be."""
    settings = _settings(cfg, OnlineSettings)
    check_online(settings)
    return settings


def _settings(cfg: DictConfig, kind: type[S]) -> S:
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))
    except OmegaConfBaseException as error:
        raise UserError(f"workload: {str(error).splitlines()[0]}") from error
    return cast(S, settings)


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


def learns(policy: Policy) -> bool:
    """Tell whether history prompts leave anything in a policy."""
    return policy.placement.prediction != "none" and policy.placement.learns


def load_store(cfg: DictConfig, policy: Policy, model_id: str) -> None:
    """Load the store that the config names, and make sure that one can be saved."""
    load, save = cfg.store.load, cfg.store.save
    if (load or save) and not learns(policy):
        raise UserError(f"system={cfg.system.label} keeps no store to load or save")
    if load:
        try:
            policy.load(Path(load), model_id)
        except StoreMismatch as error:
            raise UserError(f"{error}; give a store saved for this model, or none") from error
        except NotImplementedError:
            raise UserError(f"system={cfg.system.label} keeps no store to load") from None
    if save:
        try:
            Path(save).parent.mkdir(parents=True, exist_ok=True)
            policy.save(Path(save), model_id)
        except OSError as error:
            raise UserError(
                f"cannot write {save}: {error.strerror}; choose another file"
            ) from error
        except NotImplementedError:
            raise UserError(f"system={cfg.system.label} keeps no store to save") from None
