"""What a reproduction gives to its workers: record traces, carry out a run, make a figure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.reproduce.run_store import ERROR, RunStore
from experiments.reproduce.sweeps import Experiment
from experiments.run.console import Console
from experiments.run.records import alone_in, existing_record, other_code, read_record


@dataclass(frozen=True)
class Plan:
    """What one experiment needs: runs by digest, or an analysis and its traces."""

    experiment: Experiment
    content: dict[str, Any]
    """What its file under `experiments/` says, but for files and provenance."""
    runs: dict[str, DictConfig] = field(default_factory=dict)
    analysis: DictConfig | None = None
    traced: dict[tuple[str, str], DictConfig] = field(default_factory=dict)


def record_traces(configs: Sequence[DictConfig]) -> None:
    """Record the traces that these configs need, each once. Raises UserError."""
    from experiments.run.routing import kept_trace

    for cfg in configs:
        kept_trace(cfg, Console(quiet=True))


def run_one(cfg: DictConfig) -> None:
    """Carry out one run, and log it where its config says. Raises UserError."""
    log(cfg, recorded(cfg, Console(quiet=True)))
    (Path(cfg.output) / ERROR).unlink(missing_ok=True)


def recorded(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Return the complete record of this config, made now unless it is there. Raises UserError."""
    from experiments.run.protocol import run

    held = existing_record(cfg)
    if held is None:
        with alone_in(Path(cfg.output)):
            # Another process may have made it meanwhile.
            held = existing_record(cfg)
            if held is None:
                return run(cfg, console)
    record = read_record(held)
    console.skipped(held, other_code(record))
    return record


def log(cfg: DictConfig, record: dict[str, Any]) -> None:
    """Log a complete record where its config says."""
    from experiments.run.tracking import log_record

    if cfg.logger.name == "wandb":
        log_record(cfg.logger.project, Path(cfg.output), record)


def make(plan: Plan, store: RunStore) -> None:
    """Analyse, if it is an analysis, draw, and mark the experiment complete. Raises UserError."""
    from experiments.judge.frame import run_frame
    from experiments.run.routing import kept_trace

    experiment, name = plan.experiment, plan.experiment.id
    drawn: Any = store.analysis(name)
    if experiment.analysis:
        paths = {key: kept_trace(one, Console(quiet=True)) for key, one in plan.traced.items()}
        function(experiment.analysis)(plan.analysis, paths, drawn)
    else:
        drawn = run_frame([store.record(one) for one in plan.runs])
    if experiment.draws:
        store.figures.mkdir(parents=True, exist_ok=True)
        function(experiment.draws)(drawn, store.figures, plan.content["mixed_modes"])
    store.write_experiment(name, plan.content)


def function(dotted: str) -> Callable[..., Any]:
    """Return what ``module.name`` names; raise UserError if there is no such thing."""
    module, _, name = dotted.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function {dotted}: {error}") from error
    return found
