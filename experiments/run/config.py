"""A run's config: how its options become objects, and a check of the whole before anything slow.

An option's type and range are the annotations of what takes it. Only CUDA devices need torch here.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from experiments.errors import UserError, refusing
from experiments.run.records import check_writable
from experiments.run.weights import source_of
from experiments.run.workloads import WorkloadSettings
from finemoe.costs import ModelSizes, counted_sizes, published_sizes
from finemoe.offload.budget import BudgetError, parse_budget, plan_slots
from finemoe.offload.policy import ModelShape, Policy
from finemoe.options import Count, Flag, Number, Text, schema
from finemoe.testbed import SimulatedTestbed, Testbed

DESCRIPTIONS = ("_target_", "label", "lengths", "backend", "look", "prediction_us", "uses_host")
NAME: Any = Annotated[Text, Field(pattern=r"^\w[\w.+-]*$")]  # it becomes part of file names

OPTIONS = schema(  # of a config, but for what targets check of their own
    system=schema(label=NAME),
    model=schema(
        name=NAME,
        hub_id=Text,
        dtype=Literal["bfloat16", "float16", "float32"],
        prefetch_distance=Count,
        dummy_tokenizer=Text | None,
    ),
    dataset=schema(name=NAME),
    workload=dict[str, Any],
    testbed=dict[str, Any],
    reading=dict[str, Any],
    logger=dict[Literal["name", "project"], NAME],
    weights=Text,
    memory_budget=Number | int | Text,
    protect=Flag,
    seed=Annotated[int, Field(strict=True, ge=0, lt=2**63)],
    verify=Flag,
    record=Flag,
    routing=Text | None,
    traces=Text,
    timeline=Flag,
    store=dict[Literal["load", "save"], Text | None],
    output=Text | None,
)


def run_config(cfg: DictConfig, system: str, **changes: Any) -> DictConfig:
    """Return the config that run.py would have for one of the `systems` of a command's own."""
    same = ("model", "dataset", "workload", "testbed", "reading", "weights", "seed", "output")
    run: Any = {name: cfg[name] for name in same if name in cfg}
    run |= dict.fromkeys(("verify", "record", "timeline"), False)
    run |= {"routing": None, "store": {"load": None, "save": None}, "logger": {"name": "none"}}
    run |= {"traces": "outputs/traces", "protect": cfg.reading.protect}
    return OmegaConf.create(run | changes | {"system": cfg.systems[system]})


def check(cfg: DictConfig) -> None:
    """Raise UserError for what cannot be served; fill in what model=checkpoint leaves open."""
    values = values_of(cfg)
    if (values.get("model") or {}).get("counted", ...) is None:
        from experiments.run.models import complete

        complete(cfg)
        values = values_of(cfg)
    checked(OPTIONS, values, "")
    try:
        full_size(cfg.model)
        settings: WorkloadSettings = build(cfg.workload)
        settings.check(cfg.seed)
        arguments(cfg.dataset)
        testbed = build(cfg.testbed)
        if cfg.store.save and not settings.fixed:
            raise UserError("store.save keeps what history prompts left; use workload=offline")
        if "shape" in inspect.signature(arguments(cfg.system, shape=None).func).parameters:
            _check_policy(cfg, settings, testbed)
        else:  # A system that has a backend of its own in place of a policy.
            build(cfg.system)
            own = f"system={cfg.system.label} serves"
            if not settings.fixed:
                raise UserError(f"{own} fixed batches; use workload=offline")
            if isinstance(testbed, SimulatedTestbed):
                raise UserError(f"{own} with a real model; use testbed=emulated")
    except (MemoryError, OverflowError) as error:
        raise UserError(f"the config asks for more than fits memory ({error}); lower it") from error
    with refusing("config", ValueError, remedy="give finite numbers"):
        json.dumps(values, allow_nan=False)
    if cfg.weights != "dummy":
        source_of(cfg.model, cfg.weights)
    if cfg.weights not in ("dummy", "scale"):
        from experiments.run.models import check_weights

        check_weights(cfg)


def _check_policy(
    cfg: DictConfig, settings: WorkloadSettings, testbed: Testbed | SimulatedTestbed
) -> None:
    own, small = cfg.model, OmegaConf.select(cfg.model, "scale.config.hidden_size")
    hidden = small if cfg.weights == "scale" and small else own.hidden_size
    shape = ModelShape(own.layers, own.experts, own.top_k, hidden)
    policy, _, _ = build_policy(cfg, shape, full_size(own).expert_bytes, testbed)
    if policy.set_future_routing and not settings.fixed:
        cause = f"system={cfg.system.label} must know all iterations beforehand, and online they"
        raise UserError(f"{cause} depend on how fast it serves; use workload=offline")
    if isinstance(testbed, SimulatedTestbed):
        testbed.costs(own, cfg.system, True)


def build(cfg: DictConfig, **extra: Any) -> Any:
    """Call the target of a group's option with its arguments and `extra`; UserError if refused."""
    call = arguments(cfg, **extra)
    with refusing(str(cfg._target_), ValueError, KeyError, TypeError):
        return checked(call, {}, str(cfg._get_full_key(None) or cfg._target_))


def arguments(cfg: DictConfig, **extra: Any) -> partial[Any]:
    """Return the target of a group's option with its arguments, or UserError by its annotations."""
    values = values_of(cfg)
    name = str(values.get("_target_"))
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
        signature = inspect.signature(target).parameters.values()
    except Exception as error:  # A module may raise anything while it is imported.
        cause = str(error).partition("\n")[0]
        remedy = "set PYTHONPATH to its module's folder"
        raise UserError(f"_target_={name} cannot be imported ({cause}); {remedy}") from error
    try:
        function = target.__init__ if inspect.isclass(target) else target
        hints = get_type_hints(function, include_extras=True)
    except NameError:  # A type that only type checkers import: what it annotates is not checked.
        hints = {}
    fields = {
        one.name: (hints.get(one.name, Any), ... if one.default is one.empty else one.default)
        for one in signature
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name not in extra
    }
    # A testbed takes prediction_us; a system's describes it.
    given = {key: one for key, one in values.items() if key in fields or key not in DESCRIPTIONS}
    free = any(one.kind is one.VAR_KEYWORD for one in signature)
    kind = schema("allow" if free else "forbid", **fields)
    valid = checked(kind, given, str(cfg._get_full_key(None) or name))
    return partial(target, **{key: getattr(valid, key) for key in given}, **extra)


def values_of(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as a dictionary; raise UserError for what does not resolve."""
    with refusing("config", OmegaConfBaseException, remedy="mend it"):
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return values


def checked(kind: Any, values: Mapping[str, Any], key: str) -> Any:
    """Return `kind(**values)`; raise UserError, which names the first option below `key`."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, (*filter(None, [key]), *first["loc"])))
        value = "" if first["type"].startswith("missing") else f"={first['input']}"
        said = f"{path}{value}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UserError(said.replace("\n", " ")) from error


def full_size(model: DictConfig) -> ModelSizes:
    """Return the full-size shapes that conf/model or a checkpoint gives; raise UserError."""
    values = values_of(model)
    counted = values.get("counted")
    routing = ("layers", "experts", "top_k", "hidden_size", "expert_intermediate_size")
    own = {name: values[name] for name in routing if name in values}
    own |= counted or values.get("full_size") or {}
    own.pop("shared_expert_bytes", None)  # They are among the dense ones.
    sizes: ModelSizes = checked(counted_sizes if counted else published_sizes, own, "model")
    if sizes.top_k > sizes.experts:
        raise UserError(f"model.top_k={sizes.top_k}: there are only {sizes.experts} experts")
    return sizes


def identity(cfg: DictConfig) -> str:
    """Return what a store of expert maps is marked with."""
    return f"{cfg.model.name} with weights {cfg.weights}"


def build_policy(
    cfg: DictConfig, shape: ModelShape, expert_bytes: int, testbed: Testbed | SimulatedTestbed
) -> tuple[Policy, int, tuple[int, ...]]:
    """Return a system's policy with the store that it starts from, its budget in bytes and slots.

    The slots are those of each device. Raises UserError for a budget that cannot be, or that does
    not fit a simulated device, of which the first also holds what is dense; and for a store that
    the system does not keep, that is another model's, or that cannot be saved.
    """
    policy: Policy = build(cfg.system, shape=shape)
    devices = testbed.devices if isinstance(testbed, SimulatedTestbed) else len(testbed.devices)
    try:
        asked = "100%" if policy.placement.everything_resident else cfg.memory_budget
        budget = parse_budget(asked, expert_bytes, shape)
        slots = plan_slots(budget, expert_bytes, shape, devices)
    except BudgetError as error:
        raise UserError(f"{error}") from error
    if (cfg.store.load or cfg.store.save) and policy.history is None:
        raise UserError(f"system={cfg.system.label} keeps no store to load or save")
    if cfg.store.load and policy.history:
        with refusing("store.load", ValueError, remedy="give one of this model, or none"):
            policy.history.load(Path(cfg.store.load), identity(cfg))
    if cfg.store.save:
        check_writable(Path(cfg.store.save).parent, "store.save")
    if isinstance(testbed, SimulatedTestbed):
        needed = [count * expert_bytes for count in slots]
        needed[0] += full_size(cfg.model).dense_bytes
        for device, size in enumerate(needed):
            if size > testbed.device_bytes:
                has = f"{testbed.name}, which has {testbed.device_bytes / 1e9:.1f}"
                needs = f"the memory budget needs {size / 1e9:.1f} GB on device {device} of {has}"
                raise UserError(f"{needs}; lower memory_budget")
    return policy, budget, slots
