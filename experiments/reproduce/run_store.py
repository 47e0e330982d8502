"""Where reproduced results lie, runs by digest and shared by all figures, and what makes them.

<results>/runs/<digest>/run.json, requests.parquet    one run; all of them: runs.tar.xz
<results>/analysis/<id>/                              one analysis of routing traces
<results>/figures/<id>.png, .pdf, .csv, .txt          what was drawn
<results>/experiments/<id>.json                       an experiment: written last
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.reproduce.sweeps import Experiment, digest
from experiments.run.console import Console
from experiments.run.records import (
    INDEX,
    RECORD,
    REQUESTS,
    alone_in,
    existing_record,
    of_these_weights,
    other_code,
    provenance,
    read_checked,
    read_record,
)
from finemoe.files import atomic_write, write_json

ERROR = "error.txt"
AUTO, SIMULATED = "experiments.run.testbeds.auto", "experiments.run.testbeds.simulated"


@dataclass(frozen=True)
class Plan:
    """What one experiment needs: runs by digest, or an analysis and its traces."""

    experiment: Experiment
    content: dict[str, Any]  # what its file under `experiments/` says, but for files and provenance
    runs: dict[str, DictConfig] = field(default_factory=dict)
    analysis: DictConfig | None = None
    traced: dict[tuple[str, str], DictConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStore:
    """A results folder: where its parts lie, by a run's digest or an experiment's id."""

    root: Path

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def run(self, identity: str) -> Path:
        return self.root / "runs" / identity

    def record(self, identity: str) -> Path:
        return self.run(identity) / RECORD

    def analysis(self, name: str) -> Path:
        return self.root / "analysis" / name

    def experiment(self, name: str) -> Path:
        return self.root / "experiments" / f"{name}.json"

    def complete(self, identity: str) -> bool:
        """Tell whether the run is there, of today's weights; UserError for a malformed record."""
        path = self.record(identity)
        return path.exists() and of_these_weights(read_record(path))

    def adopt(self, folder: Path, wanted: Collection[str]) -> int:
        """Copy the runs of these digests, as far as they are not here, from records below a folder.

        Returns how many. A sweep without testbed= that was simulated counts as what it simulated.
        Raises UserError if there is no such folder, or a malformed record in it.
        """
        if not folder.is_dir():
            raise UserError(f"records={folder} is no folder; name one that a sweep left")
        adopted = 0
        for path in sorted(folder.rglob(RECORD)):
            record = read_record(path)
            cfg = OmegaConf.create(record["config"])
            if record["mode"] == "simulated" and cfg.testbed.get("_target_") == AUTO:
                cfg.testbed._target_ = SIMULATED
            identity = digest(cfg)
            if identity in wanted and not self.record(identity).exists():
                # The record completes the run.
                for name in (REQUESTS, RECORD):
                    with atomic_write(self.run(identity) / name) as partial:
                        shutil.copyfile(path.parent / name, partial)
                adopted += 1
        return adopted

    def made(self, name: str, source: str) -> bool:
        """Tell whether it was made of this source and all is there; UserError for a bad record."""
        try:
            index = read_checked(self.experiment(name), INDEX, "experiment record")
        except UserError:
            return False
        files = [self.root / one for one in index.get("files", ())]
        records = [self.record(one) for one in index.get("runs", ())]
        if index.get("source") != source or not all(one.exists() for one in (*files, *records)):
            return False
        return all(map(read_record, records))

    def write_experiment(self, name: str, content: Mapping[str, Any]) -> None:
        """Mark an experiment complete, with the files that it left."""
        left = (*self.figures.glob(f"{name}.*"), *self.analysis(name).glob("*"))
        files = sorted(str(path.relative_to(self.root)) for path in left)
        whole = {**content, "files": files, "provenance": provenance()}
        write_json(self.experiment(name), whole)


def record_traces(configs: Sequence[DictConfig]) -> None:
    """Record the traces that these configs need, each once. Raises UserError."""
    from experiments.run.routing import kept_trace

    for cfg in configs:
        kept_trace(cfg, Console(quiet=True))


def run_one(cfg: DictConfig) -> None:
    """Carry out one run, and log it where its config says. Raises UserError."""
    ensure_record(cfg, Console(quiet=True))
    (Path(cfg.output) / ERROR).unlink(missing_ok=True)


def ensure_record(cfg: DictConfig, console: Console) -> None:
    """Make the complete record of this config unless it is there, and log it. Raises UserError."""
    from experiments.run.protocol import run
    from experiments.run.tracking import log_record

    folder, record = Path(cfg.output), None
    path = existing_record(cfg)
    if path is None:
        with alone_in(folder):
            # Another process may have made it meanwhile.
            path = existing_record(cfg)
            if path is None:
                record = run(cfg, console)
    if path:
        record = read_record(path)
        console.skipped(path, other_code(record))
    if record and cfg.logger.name == "wandb":
        log_record(cfg.logger.project, folder, record)


def make(plan: Plan, store: RunStore) -> None:
    """Analyse, if it is an analysis, draw, and mark the experiment complete. Raises UserError."""
    from experiments.judge.frame import run_frame
    from experiments.run.routing import kept_trace

    experiment = plan.experiment
    runs = run_frame([store.record(one) for one in plan.runs])
    drawn: Any = store.analysis(experiment.id) if experiment.analysis else runs
    if experiment.readings:
        function(str(experiment.analysis))(runs, plan.content["views"], drawn)
    elif experiment.analysis:
        paths = {key: kept_trace(one, Console(quiet=True)) for key, one in plan.traced.items()}
        function(experiment.analysis)(plan.analysis, paths, drawn)
    if experiment.draws:
        store.figures.mkdir(parents=True, exist_ok=True)
        function(experiment.draws)(drawn, store.figures, plan.content["mixed_modes"])
    store.write_experiment(experiment.id, plan.content)


def function(dotted: str) -> Callable[..., Any]:
    """Return what ``module.name`` names; raise UserError if there is no such thing."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function {dotted}: {error}") from error
