"""A run's config: how its options become objects, and a check of the whole before anything slow.

Values are checked against the annotations of what takes them (finemoe/options.py), so an option's
type and range are declared where it is used, and once. Only CUDA devices need torch here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from experiments.errors import UserError
from experiments.run.weights import source_of
from experiments.run.workloads import WorkloadSettings
from finemoe.costs import FullSizeModel
from finemoe.expert_map import StoreMismatch
from finemoe.offload.budget import BudgetError, parse_budget, plan_slots
from finemoe.offload.policy import ModelShape, Policy
from finemoe.options import CHECKED, Count, Flag, Number, Text
from finemoe.testbed import SimulatedTestbed, Testbed

S = TypeVar("S")

DESCRIPTIONS = ("label", "lengths", "backend", "look", "prediction_us")
"""Keys of a config group's option that describe it and are no arguments of its target."""
ARGUMENTS = ConfigDict(**CHECKED, arbitrary_types_allowed=True, protected_namespaces=())
NAME = r"\w[\w.+-]*"
"""Of a model, dataset, system or logger: it becomes part of file names."""


class Options(BaseModel):
    """What stands beside the groups in conf/config.yaml, and of each group what all options have.

    The groups' own values are checked by their targets.
    """

    model_config = ConfigDict(**{**CHECKED, "extra": "ignore"})

    weights: Text
    memory_budget: Number | int | Text
    protect: Flag
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)]
    verify: Flag
    record: Flag
    routing: Text | None
    traces: Text
    timeline: Flag
    store: dict[Literal["load", "save"], Text | None]
    output: Text | None
    logger: dict[Literal["name", "project"], Annotated[Text, Field(pattern=f"^{NAME}$")]]


class ModelFacts(BaseModel):
    """What conf/model says beside shapes."""

    model_config = ConfigDict(**{**CHECKED, "extra": "ignore"})

    hub_id: Text
    dtype: Literal["bfloat16", "float16", "float32"]
    prefetch_distance: Count
    dummy_tokenizer: Text


def check(cfg: DictConfig) -> None:
    """Raise UserError for whatever in a config cannot be served, within a second or two.

    Reads small files that the config names, such as a store; loads no weights and no dataset.
    """
    try:
        _check(plain(cfg), cfg)
    except (MemoryError, OverflowError) as error:
        raise UserError(f"the config asks for more than fits memory ({error}); lower it") from error


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain data; raise UserError for what does not resolve."""
    try:
        found: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}; mend it") from error
    return found


def _check(values: dict[str, Any], cfg: DictConfig) -> None:
    for group in ("system", "model", "dataset", "workload", "testbed"):
        if not isinstance(values[group], dict):
            raise UserError(f"{group}={values[group]}: choose one of conf/{group}")
    for group, key in (("system", "label"), ("model", "name"), ("dataset", "name")):
        name = values[group].get(key)
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise UserError(f"{group}.{key}={name}: give letters, digits, dots, + - and _")
    checked(Options, values, "")
    checked(ModelFacts, values["model"], "model")
    full_size(cfg.model)
    settings: WorkloadSettings = build(cfg.workload)
    settings.check(cfg.seed)
    arguments(cfg.dataset)
    testbed = build(cfg.testbed)
    if cfg.store.save and not settings.fixed:
        raise UserError("store.save keeps what history prompts left; use workload=offline for it")
    target, _ = arguments(cfg.system, {"shape": None})
    is_policy = "shape" in inspect.signature(target).parameters
    (_check_policy if is_policy else _check_whole)(cfg, settings, testbed)
    if cfg.weights == "dummy":
        return
    source_of(cfg.model, cfg.weights)
    if cfg.weights != "scale":
        from experiments.run.models import check_weights

        check_weights(cfg)


def _check_whole(
    cfg: DictConfig, settings: WorkloadSettings, testbed: Testbed | SimulatedTestbed
) -> None:
    label = cfg.system.label
    if not settings.fixed:
        raise UserError(f"system={label} serves fixed batches; use workload=offline")
    if isinstance(testbed, SimulatedTestbed):
        raise UserError(f"system={label} serves with a real model; use testbed=emulated")
    build(cfg.system)


def _check_policy(
    cfg: DictConfig, settings: WorkloadSettings, testbed: Testbed | SimulatedTestbed
) -> None:
    shape = routing_shape(cfg)
    policy: Policy = build(cfg.system, shape=shape)
    if policy.set_future_routing and not settings.fixed:
        raise UserError(
            f"system={cfg.system.label} must know all iterations beforehand, and who is in which "
            "depends on how fast it serves; use workload=offline"
        )
    expert_bytes = full_size(cfg.model).expert_bytes
    if isinstance(testbed, SimulatedTestbed):
        _, slots = budget_slots(cfg, policy, expert_bytes, shape, testbed.devices)
        check_room(cfg, testbed, slots)
        testbed.costs(cfg.model, cfg.system, True)
    else:
        budget_slots(cfg, policy, expert_bytes, shape, len(testbed.devices))
    load_store(cfg, policy)


# Objects from options -----------------------------------------------------------------------------


def build(cfg: DictConfig, **extra: Any) -> Any:
    """Call the target of a config group's option with its arguments and `extra`.

    Raises UserError for a value or a key that the target refuses.
    """
    target, given = arguments(cfg, extra)
    try:
        # Hydra would turn arguments that are dataclasses into configs, which are slow to read.
        return target(**given, **extra)
    except ValidationError as error:
        raise UserError(_complaint(error, _key(cfg))) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{cfg._target_}: {error}") from error


def arguments(
    cfg: DictConfig, extra: Mapping[str, Any] | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the target of a config group's option, and its arguments as it annotates them.

    Raises UserError for a value or a key that the annotations refuse.
    """
    values = plain(cfg)
    given = {k: v for k, v in values.items() if k not in (*DESCRIPTIONS, "_target_")}
    try:
        target = instantiate({"_target_": values["_target_"]}, _partial_=True).func
    except (InstantiationException, KeyError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        told = f"_target_={values.get('_target_')} cannot be imported ({cause})"
        raise UserError(f"{told}; set PYTHONPATH to the folder of its module") from error
    try:
        signature = inspect.signature(target).parameters
    except ValueError:
        # A class whose __init__ is compiled tells no names: the call itself checks them.
        signature = inspect.signature(lambda **_: None).parameters
    hints = _hints(target)
    fields: Any = {
        name: (hints.get(name, Any), ... if one.default is one.empty else one.default)
        for name, one in signature.items()
        if name not in (extra or ()) and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    free = any(one.kind is one.VAR_KEYWORD for one in signature.values())
    config = ConfigDict(**{**ARGUMENTS, "extra": "allow" if free else "forbid"})
    found = checked(create_model("Arguments", __config__=config, **fields), given, _key(cfg))
    return target, {name: getattr(found, name) for name in given}


def checked(kind: type[S], values: Mapping[str, Any], key: str) -> S:
    """Return `kind(**values)`; raise UserError, which names the option below `key`."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(_complaint(error, key)) from error


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        function = target.__init__ if inspect.isclass(target) else target
        return get_type_hints(function, include_extras=True)
    except NameError:
        # A type that only type checkers import: what it annotates is not checked.
        return {}


def _complaint(error: ValidationError, key: str) -> str:
    """Return the first refusal as a line; of a union's, the last, which is the most general."""
    first = error.errors(include_url=False)[0]
    path = ".".join([key, *map(str, first["loc"])] if key else map(str, first["loc"]))
    value = "" if first["type"] == "missing" else f"={first['input']}"
    return f"{path}{value}: {first['msg'][:1].lower()}{first['msg'][1:]}".replace("\n", " ")


def _key(cfg: DictConfig) -> str:
    return str(cfg._get_full_key(None) or cfg.get("_target_", ""))


# What several kinds of runs need ------------------------------------------------------------------


def full_size(model: DictConfig) -> FullSizeModel:
    """Return the full-size shapes that conf/model gives; raise UserError."""
    values = plain(model)
    routing = ("layers", "experts", "top_k", "hidden_size", "expert_intermediate_size")
    own = {name: values[name] for name in routing if name in values}
    found = checked(FullSizeModel, {**own, **(values.get("full_size") or {})}, "model")
    if found.top_k > found.experts:
        raise UserError(f"model.top_k={found.top_k}: there are only {found.experts} experts")
    return found


def routing_shape(cfg: DictConfig) -> ModelShape:
    """Return the routing shape of the weights that a config names."""
    model = cfg.model
    hidden = model.scale.config.hidden_size if cfg.weights == "scale" else model.hidden_size
    return ModelShape(model.layers, model.experts, model.top_k, hidden)


def identity(cfg: DictConfig) -> str:
    """Return what a store of expert maps is marked with."""
    return f"{cfg.model.name} with weights {cfg.weights}"


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


def check_room(cfg: DictConfig, testbed: SimulatedTestbed, slots: tuple[int, ...]) -> None:
    """Raise UserError if a device cannot hold its slots; the first one also holds what is dense."""
    model = full_size(cfg.model)
    for device, count in enumerate(slots):
        needed = count * model.expert_bytes + (0 if device else model.dense_bytes)
        if needed > testbed.device_bytes:
            raise UserError(
                f"the memory budget needs {needed / 1e9:.1f} GB on device {device} of "
                f"{testbed.name}, which has {testbed.device_bytes / 1e9:.1f}; lower memory_budget"
            )


def load_store(cfg: DictConfig, policy: Policy) -> None:
    """Load the store that the config names, and make sure that one can be saved."""
    load, save = cfg.store.load, cfg.store.save
    if not (load or save):
        return
    if policy.history is None:
        raise UserError(f"system={cfg.system.label} keeps no store to load or save")
    if load:
        try:
            policy.history.load(Path(load), identity(cfg))
        except StoreMismatch as error:
            raise UserError(f"{error}; give a store saved for this model, or none") from error
    if save:
        try:
            Path(save).parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=Path(save).parent).close()
        except OSError as error:
            raise UserError(
                f"cannot write {save}: {error.strerror}; choose another file"
            ) from error
