"""From an experiment's file and a user's overrides to the configs of its runs.

`conf/experiment/<name>.yaml` holds `hydra.sweeper.params` (multiplied out as a Hydra multirun does)
and `experiment.cells`: lists of overrides, each multiplied with the parameters it does not set.
"""

import hashlib
import itertools
import json
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments import CONF
from experiments.errors import UserError, config_error
from experiments.judge.frame import IDS
from experiments.run.records import comparable
from experiments.run.weights import fingerprint
from experiments.style import ordered

NO_MATTER = ("system", "memory_budget")  # for routing: an analysis passes over a sweep of it
Words = Sequence[str]
Sweep = dict[str, list[str]]  # overrides by key, one for each value of the key
Configs = dict[str, DictConfig]  # of runs, by digest
Experiment = SimpleNamespace  # `id`, `title`, those of UNSAID, file `name`, `params` that it sweeps
UNSAID: dict[str, Any] = {
    "draws": None,  # dotted name of the function that draws its figure
    "beyond": False,  # made when asked for by its id, not by `all`
    "analysis": None,  # the function that analyses traces; None: run records
    "models": [],
    "datasets": [],  # models and datasets whose traces are analysed
    "cells": [],
    "readings": {},  # overrides by the name of what they stand for: `of` is run under each of them
    "of": {},  # by id, what narrows it
}


def available(conf: Path = CONF) -> dict[str, Experiment]:
    """Return all experiments by id: in the paper's order, then others."""
    known = {}
    for path in (conf / "experiment").glob("*.yaml"):
        content: Any = OmegaConf.load(path)
        own: Any = content.get("experiment") or {}
        if "id" not in own or "title" not in own:
            raise UserError(f"{path} is no experiment: it lacks experiment.id or experiment.title")
        swept = OmegaConf.select(content, "hydra.sweeper.params") or {}
        params = [f"{key}={value}" for key, value in swept.items()]
        identity = str(own.id)
        facts = {"id": identity, "name": path.stem, "params": params}
        # Interpolations stay: a run's own config resolves them.
        own = OmegaConf.to_container(own, resolve=False)
        known[identity] = Experiment(**UNSAID | own | facts)
    return {one: known[one] for one in ordered(known, IDS)}


def chosen(ids: Words, conf: Path = CONF) -> list[Experiment]:
    """Return the experiments with these ids, or all; UserError lists what there is."""
    known = available(conf)
    unknown = [one for one in ids if one != "all" and one not in known]
    if unknown or not ids:
        cause = f"unknown experiment {unknown[0]}" if unknown else "which experiment?"
        raise UserError(f"{cause}; choose all, or some of {', '.join(known)}")
    return [one for one in known.values() if one.id in ids or ("all" in ids and not one.beyond)]


def run_configs(experiment: Experiment, overrides: Words, conf: Path = CONF) -> Configs:
    """Return the configs of an experiment's runs by digest. Raises UserError."""
    params, user = parse(experiment.params), parse(overrides)
    combinations = combine(params, experiment.cells, user, _groups(conf))
    if not combinations:
        raise UserError(f"nothing of experiment {experiment.id} is left by {' '.join(overrides)}")
    configs = [_of_run(_composed(experiment, one, conf)) for one in combinations]
    return {digest(cfg): cfg for cfg in configs}


def reading_configs(
    experiment: Experiment, overrides: Words, conf: Path = CONF
) -> tuple[dict[str, dict[str, list[str]]], Configs]:
    """Return digests of runs, under each reading of each experiment it is of, and their configs."""
    known, views, runs = available(conf), defaultdict[str, dict[str, list[str]]](dict), Configs()
    for name, own in experiment.readings.items():
        for identity, narrowed in experiment.of.items():
            configs = run_configs(known[identity], [*narrowed, *own, *overrides], conf)
            views[name][identity] = list(configs)
            runs |= configs
    return dict(views), runs


def analysis_config(
    experiment: Experiment, overrides: Words, conf: Path = CONF
) -> tuple[DictConfig, dict[tuple[str, str], DictConfig]]:
    """Return an analysis's own config, and those of the (model, dataset) whose traces it needs."""
    sweep = parse(overrides)
    models = [_value(one) for one in sweep.pop("model", ())] or list(experiment.models)
    datasets = [_value(one) for one in sweep.pop("dataset", ())] or list(experiment.datasets)
    for key, values in list(sweep.items()):
        if len(values) > 1 and key.split(".")[0] not in NO_MATTER:
            raise UserError(f"experiment {experiment.id} takes one {key}, not {len(values)}")
    fixed = [values[0] for values in sweep.values() if len(values) == 1]
    own = _composed(experiment, fixed, conf)
    traced = {
        one: _of_run(_composed(experiment, [*fixed, f"model={one[0]}", f"dataset={one[1]}"], conf))
        for one in itertools.product(models, datasets)
    }
    with open_dict(own):
        own.experiment.models, own.experiment.datasets = models, datasets
    return own, traced


def source(overrides: Words, conf: Path = CONF) -> str:
    """Return a digest over what an experiment is made of: files of `conf`, overrides, weights."""
    files = sorted(conf.glob("**/*.yaml"))
    texts = [(str(one.relative_to(conf)), one.read_text()) for one in files]
    defaults = OmegaConf.load(conf / "config.yaml")
    kinds = [_value(one) for one in parse(overrides).get("weights", [])] or [str(defaults.weights)]
    models = [OmegaConf.load(path) for path in sorted((conf / "model").glob("*.yaml"))]
    models = [one for one in models if one.name]  # A checkpoint's weights are among `kinds`.
    # A seed among the overrides is in the digest as such.
    prints = [fingerprint(model, kind, defaults.seed) for model in models for kind in kinds]
    return _digest_of([texts, overrides, prints])


def digest(cfg: DictConfig) -> str:
    """Return the identity of a run: 16 hex digits over all that its result depends on."""
    return _digest_of(comparable(cfg))


def _digest_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def parse(overrides: Iterable[str]) -> Sweep:
    """Expand overrides as Hydra's multirun would; a key given twice counts as last given."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return {one.key_or_group: _values(one) for one in parsed}
    except HydraException as error:
        raise UserError(config_error(error)) from error


def combine(params: Sweep, cells: Sequence[Words], user: Sweep, groups: set[str]) -> list[Words]:
    """Return the lists of overrides that params, cells and the user's overrides stand for.

    A key of the user's replaces the sweep of that key. Cells are written for one choice of a group,
    so that the user's choice of a group leaves out the cells of another.
    """
    swept = {**params, **user}
    products = [swept] if params or not cells else []
    for cell in map(parse, cells):
        for key in cell.keys() & user.keys():
            both = [one for one in cell[key] if one in user[key]]
            cell[key] = both if key in groups else user[key]
        products.append({**swept, **cell})
    combinations = (itertools.product(*one.values()) for one in products)
    return list(dict.fromkeys(itertools.chain.from_iterable(combinations)))


def _value(override: str) -> str:
    return override.partition("=")[2]


def _values(override: Override) -> list[str]:
    if override.is_delete():
        return [override.get_key_element()]
    if not override.is_sweep_override():
        return [f"{override.get_key_element()}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: an interval has no list of values")
    return [f"{override.get_key_element()}={one}" for one in override.sweep_string_iterator()]


def _composed(experiment: Experiment, overrides: Words, conf: Path) -> DictConfig:
    """Return the resolved config of an experiment under overrides. Raises UserError."""
    # Composing takes long: plain values are set afterwards.
    plain = (one for one in overrides if re.fullmatch(r"[a-z_.]+=.*", one, re.DOTALL))
    values = [one for one in plain if one.partition("=")[0] not in _groups(conf)]
    choices = tuple(one for one in overrides if one not in values)
    try:
        cfg: DictConfig = pickle.loads(_by_hydra(conf, experiment.name, choices))
        for one in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True)
        if cfg.model.get("counted", ...) is None:
            from experiments.run.models import complete  # It needs torch and transformers.

            complete(cfg)
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        cause = f"experiment {experiment.id}, {' '.join(overrides)}: {config_error(error)}"
        raise UserError(cause) from error
    return cfg


@cache
def _by_hydra(conf: Path, experiment: str, choices: tuple[str, ...]) -> bytes:
    """Compose an experiment's config; a pickle is read six times as fast as a config is copied."""
    groups = [one for one in choices if one.partition("=")[0] in _groups(conf)]
    others = (one for one in choices if one not in groups)
    words = (f"experiment={experiment}", "output=unset", *others)
    plain = _composition(conf, words)
    content = dict(plain)
    # Hydra takes a quarter of a second: each option is composed once, not in all combinations.
    for option in groups:
        own = _composition(conf, (*words, option))
        content |= {key: own[key] for key in own if own[key] != plain.get(key)}
    cfg = OmegaConf.create(content)
    OmegaConf.set_struct(cfg, True)
    return pickle.dumps(cfg)


@cache
def _composition(conf: Path, words: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        content: Any = OmegaConf.to_container(compose("config", list(words)))
    return content


@cache
def _groups(conf: Path) -> set[str]:
    return {path.name for path in conf.iterdir() if path.is_dir()}


def _of_run(cfg: DictConfig) -> DictConfig:
    """Return the config without what its experiment says of itself: runs are shared by figures."""
    with open_dict(cfg):
        del cfg["experiment"]
    return cfg
