"""What makes reproduced results, in worker processes too; `ResultsFolder` says where they lie."""

import importlib
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.judge.frame import ResultsFolder, run_frame
from experiments.reproduce.sweeps import Experiment, digest
from experiments.run import records
from experiments.run.console import Console
from finemoe.files import atomic_write, write_json

AUTO, SIMULATED = "experiments.run.testbeds.auto", "experiments.run.testbeds.simulated"


@dataclass(frozen=True)
class Plan:
    """What one experiment needs: runs by digest, or an analysis and its traces."""

    experiment: Experiment
    content: dict[str, Any]  # what its file under `experiments/` says, but for files, provenance
    runs: dict[str, DictConfig] = field(default_factory=dict)
    analysis: DictConfig | None = None
    traced: dict[tuple[str, str], DictConfig] = field(default_factory=dict)


def complete(run: Path) -> bool:
    """Tell whether a run is there, of today's weights; UserError for a malformed record."""
    path = run / records.RECORD
    return path.exists() and records.of_these_weights(records.read_record(path))


def made(results: ResultsFolder, name: str, source: str) -> bool:
    """Tell whether an experiment was made of this source and is whole; UserError for a bad run."""
    try:
        index = records.read_checked(results.experiment(name), records.INDEX, "experiment record")
    except UserError:
        return False
    files = [results.root / one for one in index.get("files", ())]
    runs = [results.run(one) / records.RECORD for one in index.get("runs", ())]
    if index.get("source") != source or not all(one.exists() for one in (*files, *runs)):
        return False
    return all(map(records.read_record, runs))


def adopt(results: ResultsFolder, folder: Path, wanted: Collection[str]) -> int:
    """Copy the runs of these digests, as far as they are not here, from records below a folder.

    Returns how many. A sweep without testbed= that was simulated counts as what it simulated.
    Raises UserError if there is no such folder, or a malformed record in it.
    """
    if not folder.is_dir():
        raise UserError(f"records={folder} is no folder; name one that a sweep left")
    adopted = 0
    for path in sorted(folder.rglob(records.RECORD)):
        record = records.read_record(path)
        cfg = OmegaConf.create(record["config"])
        if record["mode"] == "simulated" and cfg.testbed.get("_target_") == AUTO:
            cfg.testbed._target_ = SIMULATED
        identity = digest(cfg)
        place = results.run(identity)
        if identity in wanted and not (place / records.RECORD).exists():
            # The record completes the run.
            for name in (records.REQUESTS, records.RECORD):
                with atomic_write(place / name) as partial:
                    shutil.copyfile(path.parent / name, partial)
            adopted += 1
    return adopted


def record_traces(configs: Iterable[DictConfig]) -> None:
    """Record the traces that these configs need, each once. Raises UserError."""
    from experiments.run.routing import kept_trace

    for cfg in configs:
        kept_trace(cfg, Console(quiet=True))


def make(plan: Plan, results: ResultsFolder) -> None:
    """Analyse, if it is an analysis, draw, and mark the experiment complete. Raises UserError."""
    from experiments.run.routing import kept_trace

    experiment = plan.experiment
    runs = run_frame([results.run(one) for one in plan.runs])
    drawn: Any = results.analysis(experiment.id) if experiment.analysis else runs
    if experiment.readings:
        function(str(experiment.analysis))(runs, plan.content["views"], drawn)
    elif experiment.analysis:
        paths = {key: kept_trace(one, Console(quiet=True)) for key, one in plan.traced.items()}
        function(experiment.analysis)(plan.analysis, paths, drawn)
    if experiment.draws:
        results.figures.mkdir(parents=True, exist_ok=True)
        function(experiment.draws)(drawn, results.figures, plan.content["mixed_modes"])
    write_experiment(results, experiment.id, plan.content)


def write_experiment(results: ResultsFolder, name: str, content: Mapping[str, Any]) -> None:
    """Mark an experiment complete, with the files that it left."""
    left = (*results.figures.glob(f"{name}.*"), *results.analysis(name).glob("*"))
    files = sorted(str(path.relative_to(results.root)) for path in left)
    whole = {**content, "files": files, "provenance": records.provenance()}
    write_json(results.experiment(name), whole)


def function(dotted: str) -> Callable[..., Any]:
    """Return what ``module.name`` names; raise UserError if there is no such thing."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function {dotted}: {error}") from error
