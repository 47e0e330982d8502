"""From an experiment's file and a user's overrides to the configs of its runs.

`conf/experiment/<name>.yaml` holds `experiment.id`, `hydra.sweeper.params` (multiplied out as a
Hydra multirun does) and, for what no product says, `experiment.cells`: lists of overrides, each
multiplied with the parameters that it does not set itself.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments import CONF
from experiments.errors import UserError, config_error
from experiments.run.records import comparable
from experiments.run.weights import fingerprint

NO_MATTER = ("system", "memory_budget")
"""What routing does not depend on: an analysis passes over a sweep of it."""

Overrides = tuple[str, ...]
Sweep = dict[str, list[str]]
"""Overrides by key, one for each value of the key."""


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file says about it."""

    name: str
    id: str
    title: str
    draws: str | None
    """Dotted name of the function that draws its figure."""
    analysis: str | None
    """Dotted name of the function that analyses traces; None if the data are run records."""
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    """Models and datasets whose traces are analysed."""
    params: Mapping[str, str]
    cells: tuple[Overrides, ...]


def available(conf: Path = CONF) -> dict[str, Experiment]:
    """Return all experiments by id: tables first, then figures by number."""
    found = [_experiment(path) for path in (conf / "experiment").glob("*.yaml")]
    return {one.id: one for one in sorted(found, key=lambda one: _order(one.id))}


def chosen(ids: Sequence[str], conf: Path = CONF) -> list[Experiment]:
    """Return the experiments with these ids, or all; UserError lists what there is."""
    known = available(conf)
    unknown = [one for one in ids if one != "all" and one not in known]
    if unknown or not ids:
        cause = f"unknown experiment {unknown[0]}" if unknown else "which experiment?"
        raise UserError(f"{cause}; choose all, or some of {', '.join(known)}")
    return [one for one in known.values() if "all" in ids or one.id in ids]


def run_configs(
    experiment: Experiment, overrides: Sequence[str], conf: Path = CONF
) -> list[DictConfig]:
    """Return the configs of an experiment's runs, each once. Raises UserError."""
    parsed = parse(overrides)
    params = parse_params(experiment.params)
    combinations = combine(params, experiment.cells, parsed, _groups(conf))
    if not combinations:
        raise UserError(f"nothing of experiment {experiment.id} is left by {' '.join(overrides)}")
    configs: dict[str, DictConfig] = {}
    with _composing(experiment, conf) as composed:
        for combination in combinations:
            cfg = _of_run(composed(combination))
            configs.setdefault(digest(cfg), cfg)
    return list(configs.values())


def analysis_config(
    experiment: Experiment, overrides: Sequence[str], conf: Path = CONF
) -> tuple[DictConfig, dict[tuple[str, str], DictConfig]]:
    """Return an analysis's own config, and one a (model, dataset) whose trace it needs."""
    sweep = parse(overrides)
    models = [value_of(one) for one in sweep.pop("model", ())] or list(experiment.models)
    datasets = [value_of(one) for one in sweep.pop("dataset", ())] or list(experiment.datasets)
    fixed = _single(experiment, sweep)
    with _composing(experiment, conf) as composed:
        own = composed(fixed)
        traced = {
            (model, dataset): _of_run(composed((*fixed, f"model={model}", f"dataset={dataset}")))
            for model, dataset in itertools.product(models, datasets)
        }
    with open_dict(own):
        own.experiment.models, own.experiment.datasets = models, datasets
    return own, traced


def source(overrides: Sequence[str], conf: Path = CONF) -> str:
    """Return a digest over what an experiment is made of: files of `conf`, overrides, weights."""
    files = sorted(conf.glob("**/*.yaml"))
    texts = [(str(one.relative_to(conf)), one.read_text()) for one in files]
    return digest_of([texts, overrides, _fingerprints(overrides, conf)])


def digest(cfg: DictConfig) -> str:
    """Return the identity of a run: 16 hex digits over all that its result depends on."""
    return digest_of(comparable(cfg))


def digest_of(plain: Any) -> str:
    """Return 16 hex digits over plain data."""
    packed = json.dumps(plain, sort_keys=True).encode()
    return hashlib.sha256(packed).hexdigest()[:16]


def _fingerprints(overrides: Sequence[str], conf: Path) -> list[str]:
    """Return the fingerprint of every model's weights, whichever the experiment takes."""
    chosen = parse(overrides)
    plain = OmegaConf.load(conf / "config.yaml")
    kinds = [value_of(one) for one in chosen.get("weights", [])] or [str(plain.weights)]
    models = [OmegaConf.load(path) for path in sorted((conf / "model").glob("*.yaml"))]
    # A seed among the overrides is in the digest as such.
    return [fingerprint(model, kind, plain.seed) for model in models for kind in kinds]


# Overrides ------------------------------------------------------------------------------------


def parse(overrides: Iterable[str]) -> Sweep:
    """Expand overrides as Hydra's multirun would; a key given twice counts as last given."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return {one.key_or_group: _values(one) for one in parsed}
    except HydraException as error:
        raise UserError(config_error(error)) from error


def parse_params(params: Mapping[str, str]) -> Sweep:
    """Expand `hydra.sweeper.params`."""
    return parse(f"{key}={value}" for key, value in params.items())


def combine(
    params: Sweep, cells: Sequence[Sequence[str]], user: Sweep, groups: Iterable[str]
) -> list[Overrides]:
    """Return the lists of overrides that params, cells and the user's overrides stand for.

    A key of the user's replaces the sweep of that key. Cells are written for one choice of a group,
    so that the user's choice of a group leaves out the cells of another.
    """
    swept = {**params, **user}
    combinations = product(swept) if params or not cells else []
    for cell in cells:
        own = _narrowed(parse(cell), user, groups)
        if own is not None:
            combinations += product({**swept, **own})
    return list(dict.fromkeys(combinations))


def product(sweep: Sweep) -> list[Overrides]:
    """Return every combination of one override a key; the last key changes fastest."""
    return list(itertools.product(*sweep.values()))


def value_of(override: str) -> str:
    """Return what stands right of the first ``=``."""
    return override.partition("=")[2]


def _narrowed(cell: Sweep, user: Sweep, groups: Iterable[str]) -> Sweep | None:
    """Return the cell as the user's overrides leave it, or None."""
    own = dict(cell)
    for key in cell.keys() & user.keys():
        own[key] = user[key]
        if key in groups:
            own[key] = [one for one in cell[key] if one in user[key]]
            if not own[key]:
                return None
    return own


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if override.is_delete():
        return [key]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: an interval has no list of values")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _single(experiment: Experiment, sweep: Sweep) -> Overrides:
    fixed = []
    for key, values in sweep.items():
        if len(values) == 1:
            fixed += values
        elif key.split(".")[0] not in NO_MATTER:
            raise UserError(f"experiment {experiment.id} takes one {key}, not {len(values)}")
    return tuple(fixed)


# Composition ----------------------------------------------------------------------------------


@contextmanager
def _composing(experiment: Experiment, conf: Path) -> Iterator[Callable[[Overrides], DictConfig]]:
    """Yield what returns the resolved config of an experiment under overrides, or UserError.

    Composing takes an eighth of a second, so that a sweep of plain values should not repeat it:
    they are set afterwards.
    """

    @cache
    def chosen(choices: Overrides) -> DictConfig:
        return compose("config", [f"experiment={experiment.name}", "output=unset", *choices])

    def composed(overrides: Overrides) -> DictConfig:
        values = [one for one in overrides if _is_value(one, groups)]
        try:
            cfg = chosen(tuple(one for one in overrides if one not in values)).copy()
            for one in OverridesParser.create().parse_overrides(values):
                OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True)
            OmegaConf.resolve(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            told = f"experiment {experiment.id}, {' '.join(overrides)}: {config_error(error)}"
            raise UserError(told) from error
        return cfg

    groups = _groups(conf)
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        yield composed


def _groups(conf: Path) -> set[str]:
    return {path.name for path in conf.iterdir() if path.is_dir()}


def _is_value(override: str, groups: set[str]) -> bool:
    key = override.partition("=")[0]
    return key not in groups and re.fullmatch(r"[a-z_.]+", key) is not None


def _of_run(cfg: DictConfig) -> DictConfig:
    """Return the config without what its experiment says of itself: runs are shared by figures."""
    with open_dict(cfg):
        del cfg["experiment"]
    return cfg


# Files ----------------------------------------------------------------------------------------


def _experiment(path: Path) -> Experiment:
    content = OmegaConf.load(path)
    own = OmegaConf.select(content, "experiment")
    if own is None or "id" not in own or "title" not in own:
        raise UserError(f"{path} is no experiment: it lacks experiment.id or experiment.title")
    params = OmegaConf.select(content, "hydra.sweeper.params") or {}
    return Experiment(
        path.stem,
        str(own.id),
        str(own.title),
        own.get("draws"),
        own.get("analysis"),
        tuple(own.get("models") or ()),
        tuple(own.get("datasets") or ()),
        {str(key): str(value) for key, value in params.items()},
        tuple(tuple(map(str, cell)) for cell in own.get("cells") or ()),
    )


def _order(identity: str) -> tuple[bool, int, str]:
    """Sort tables before figures, figures by number and letter."""
    number = re.match(r"\d+", identity)
    return number is not None, int(number.group()) if number else 0, identity
