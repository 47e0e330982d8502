"""Reproduce the paper's evaluation: ``python -m experiments.reproduce 12`` or ``all``.

Runs what is missing, draws what is not drawn, and, for ``all``, judges the paper's claims and
writes the report. Anything that ``run.py`` takes narrows or changes it:

    python -m experiments.reproduce 10 12 model=mixtral
    python -m experiments.reproduce all weights=hub dataset=lmsys,sharegpt testbed=local

What is complete is never done again, so that an interrupted call goes on where it stopped.
"""

import json
import os
import pkgutil
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console as RichConsole
from rich.markup import escape

from experiments import CONF, ROOT
from experiments.errors import BAD_INPUT, UserError, command, refusing, words_given
from experiments.judge.frame import ResultsFolder, run_frame
from experiments.reproduce import sweeps
from experiments.reproduce.parallel import LAUNCHERS, Outcome, Tasks, attempt, side_by_side
from experiments.reproduce.sweeps import Experiment, Words
from experiments.run import records
from experiments.run.config import build, check
from experiments.run.console import Console, bar_on
from experiments.run.protocol import ensure_record
from experiments.run.records import RECORD
from experiments.run.weights import model_of
from finemoe.files import atomic_write, write_json
from finemoe.testbed import SimulatedTestbed

OPTIONS = {
    "results": "outputs/reproduce",
    "records": "",  # runs below it, which a sweep left, are taken instead of made again
    "launcher": "joblib",
    "n_jobs": os.cpu_count() or 1,
    "mixed_modes": False,  # whether one figure shows several modes, marked as such
    "redraw": False,  # whether what is complete is made again
}
AUTO, SIMULATED = "experiments.run.testbeds.auto", "experiments.run.testbeds.simulated"


@dataclass(frozen=True)
class Plan:
    """What one experiment needs: runs by digest, or an analysis and its traces."""

    experiment: Experiment
    content: dict[str, Any]  # what its file under `experiments/` says, but for files, provenance
    runs: dict[str, DictConfig] = field(default_factory=dict)
    analysis: DictConfig | None = None
    traced: dict[tuple[str, str], DictConfig] = field(default_factory=dict)


class Reproduction:
    """One call of the command."""

    def __init__(self, ids: Words, overrides: Words, options: Any, conf: Path) -> None:
        self.chosen = sweeps.chosen(ids, conf)
        records.check_writable(Path(options["results"]), "results")
        self.options, self.results = options, ResultsFolder(Path(options["results"]))
        self.everything, self.log_to_wandb = "all" in ids, "logger=wandb" in overrides
        self.console = RichConsole(highlight=False)
        self.failures: list[Outcome] = []
        self.began, self.done = time.monotonic(), Counter[str]()
        source = sweeps.source([*overrides, f"mixed_modes={options['mixed_modes']}"], conf)
        self.plans = [
            self._plan(one, overrides, source, conf)
            for one in self.chosen
            if options["redraw"] or not made(self.results, one.id, source)
        ]
        self.wanted = {digest: cfg for plan in self.plans for digest, cfg in plan.runs.items()}
        if options["records"]:
            taken = adopt(self.results, Path(options["records"]), self.wanted)
            count = f"{taken} of {len(self.wanted)} runs"
            self._say(f"taken from {escape(options['records'])}: {count}")

    def carry_out(self) -> int:
        """Run, draw and report what is missing; return the exit code."""
        count = f"{len(self.plans)} of {len(self.chosen)} experiments"
        nothing = f"nothing to run: {len(self.chosen)} experiments are complete"
        self._say(f"to do: {count}, {len(self.pending_runs)} runs" if self.plans else nothing)
        self._say_whose_code()
        self._record_traces()
        self._run()
        self._draw()
        if self.everything and not self.failures:
            self._report()
        minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
        self._say(
            f"{'[red]not done[/]' if self.failures else 'done'} in {minutes} min {seconds} s; "
            f"runs made: {self.done['runs']}, failures: {len(self.failures)}, experiments drawn: "
            f"{self.done['figures']} of {len(self.plans)}\n"
            f"results: {escape(str(self.results.root))}"
        )
        if not self.failures:
            return 0
        return BAD_INPUT if any(one.bad_input for one in self.failures) else 1

    def _plan(self, experiment: Experiment, overrides: Words, source: str, conf: Path) -> Plan:
        content: dict[str, Any] = {
            "id": experiment.id,
            "title": experiment.title,
            "kind": "analysis" if experiment.analysis else "runs",
            "overrides": list(overrides),
            "mixed_modes": self.options["mixed_modes"],
            "source": source,
        }
        if experiment.analysis and not experiment.readings:
            own, traced = sweeps.analysis_config(experiment, overrides, conf)
            return Plan(experiment, content, analysis=own, traced=traced)
        if experiment.readings:
            content["views"], runs = sweeps.reading_configs(experiment, overrides, conf)
        else:
            runs = sweeps.run_configs(experiment, overrides, conf)
        return Plan(experiment, {**content, "runs": list(runs)}, runs)

    @cached_property
    def pending_runs(self) -> dict[str, DictConfig]:
        """The runs that are missing, or not logged as their config asks."""
        missing = {}
        for digest, cfg in self.wanted.items():
            run = self.results.run(digest)
            logged = cfg.logger.name != "wandb" or records.is_logged(run / RECORD)
            if not (logged and complete(run)):
                missing[digest] = cfg
        return missing

    def _say_whose_code(self) -> None:
        """Say how much of what is kept other code may have made."""
        done = self.wanted.keys() - self.pending_runs.keys()
        kept = [records.read_record(self.results.run(one) / RECORD) for one in done]
        for name in {one.id for one in self.chosen} - {plan.experiment.id for plan in self.plans}:
            kept.append(self.results.index(name)["provenance"])
        if old := sum(records.other_code(one) is not None for one in kept):
            what = f"{old} of {len(kept)} kept results are of another commit or of changed files"
            self._say(f"{what}; give another results= to make them again")

    def _record_traces(self) -> None:
        """Record every missing trace once; leave out the runs that a failure concerns."""
        replayed = {
            one: cfg
            for one, cfg in self.pending_runs.items()
            if not cfg.routing and in_virtual_time(cfg)
        }
        groups: dict[str, list[DictConfig]] = defaultdict(list)
        for cfg in chain(replayed.values(), *(plan.traced.values() for plan in self.plans)):
            groups[trace_group(cfg)].append(cfg)
        tasks = {name: partial(record_traces, cfgs) for name, cfgs in groups.items()}
        failed = {outcome.name for outcome in self._stage("traces", tasks, {}) if outcome.error}
        for one, cfg in replayed.items():
            if trace_group(cfg) in failed:
                del self.pending_runs[one]

    def _run(self) -> None:
        """Carry out the missing runs: simulated ones side by side, others alone, as they time."""
        tasks: tuple[dict[str, Any], ...] = ({}, {})
        for digest, cfg in self.pending_runs.items():
            cfg.output = str(self.results.run(digest))
            what = f"{cfg.system.label} on {cfg.model.name}, {cfg.dataset.name}"
            name = f"{what}, memory_budget={cfg.memory_budget} ({digest})"
            tasks[not in_virtual_time(cfg)][name] = partial(ensure_record, cfg)
        self._stage("runs", *tasks)

    def _draw(self) -> None:
        """Analyse and draw; an experiment with a run missing is left out and said."""
        tasks = {}
        for plan in self.plans:
            name = f"experiment {plan.experiment.id}"
            if missing := sum(not complete(self.results.run(one)) for one in plan.runs):
                self._say(f"{name}: not drawn, {missing} of its runs are missing")
            else:
                tasks[name] = partial(make, plan, self.results)
        for outcome in self._stage("figures", tasks, {}):
            if not outcome.error:
                picture = self.results.figures / f"{outcome.name.split()[-1]}.png"
                self._say(f"{outcome.name}: {escape(str(picture))}")

    def _report(self) -> None:
        root = self.results.root
        report = root / "REPORT.md"
        # Claims, their rules and the report's template.
        sources = [*(ROOT / "experiments" / "judge").glob("*.*")]
        sources += [self.results.experiment(one.id) for one in self.chosen]
        newest = max(path.stat().st_mtime_ns for path in sources)
        if not report.exists() or report.stat().st_mtime_ns <= newest:
            from experiments.judge.report import write

            write(self.results)
            records.pack_runs(root)
            with atomic_write(root / "records.parquet") as file:
                frame = self.results.runs.drop(columns=["record", "table"])
                frame.to_parquet(file, index=False)
        claims = json.loads((root / "claims.json").read_text())["claims"]
        verdicts = Counter(one["verdict"] for one in claims).most_common()
        self._say(f"claims: {', '.join(f'{count} {verdict}' for verdict, count in verdicts)}")
        self._say(f"report: {escape(str(report))}")
        if self.log_to_wandb:
            records.log_reproduction("finemoe", report)

    def _stage(self, what: str, tasks: Tasks, alone: Tasks) -> list[Outcome]:
        """Carry out tasks under a bar; say each failure in a line, and remember it."""
        done: list[Outcome] = []
        total, hidden = len(tasks) + len(alone), not self.console.is_terminal
        together = side_by_side(tasks, self.options["launcher"], self.options["n_jobs"])
        with bar_on(self.console) as bar, closing(together):
            shown = bar.add_task(what, total=total)
            for outcome in chain(together, starmap(attempt, alone.items())):
                done.append(outcome)
                bar.advance(shown)
                if outcome.error:
                    self.failures.append(outcome)
                    self._say(f"[red]failed[/] {outcome.name}: {escape(outcome.error)}")
                    self.console.print(outcome.trace or "", end="", style="dim", markup=False)
                else:
                    self.done[what] += 1
                # A log gets a line for every tenth instead of a bar.
                if hidden and len(done) * 10 // total > (len(done) - 1) * 10 // total:
                    self._say(f"{what}: {len(done)} of {total}")
        return done

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


def trace_group(cfg: DictConfig) -> str:
    """Name the traces that one worker records one after another, so that none is recorded twice."""
    kind = "online" if "rate" in cfg.workload else "offline"
    return f"routing of {cfg.model.name} on {cfg.dataset.name} ({kind})"


def in_virtual_time(cfg: DictConfig) -> bool:
    """Tell whether a run is simulated, so that others beside it do not disturb its times."""
    # What is amiss is said by the run itself; nothing is recorded for it.
    try:
        check(cfg)
        return isinstance(build(cfg.testbed), SimulatedTestbed)
    except UserError:
        return False


def complete(run: Path) -> bool:
    """Tell whether a run is there, of today's weights; UserError for a malformed record."""
    path = run / RECORD
    return path.exists() and records.of_these_weights(records.read_record(path))


def made(results: ResultsFolder, name: str, source: str) -> bool:
    """Tell whether an experiment was made of this source and is whole; UserError for a bad run."""
    try:
        index = results.index(name)
    except UserError:
        return False
    files = [results.root / one for one in index.get("files", ())]
    runs = [results.run(one) / RECORD for one in index.get("runs", ())]
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
    for path in sorted(folder.rglob(RECORD)):
        record = records.read_record(path)
        cfg = OmegaConf.create(record["config"])
        if record["mode"] == "simulated" and cfg.testbed.get("_target_") == AUTO:
            cfg.testbed._target_ = SIMULATED
        identity = sweeps.digest(cfg)
        place = results.run(identity)
        if identity in wanted and not (place / RECORD).exists():
            # The record completes the run.
            for name in (records.REQUESTS, RECORD):
                with atomic_write(place / name) as partial_file:
                    shutil.copyfile(path.parent / name, partial_file)
            adopted += 1
    return adopted


def record_traces(configs: Iterable[DictConfig]) -> list[Path]:
    """Record the traces that these configs need, each once; return them. Raises UserError."""
    from experiments.run.routing import kept_trace

    return [kept_trace(cfg, Console(quiet=True)) for cfg in configs]


def make(plan: Plan, results: ResultsFolder) -> None:
    """Analyse, if it is an analysis, draw, and mark the experiment complete. Raises UserError."""
    experiment = plan.experiment
    drawn: Any = run_frame([results.run(one) for one in plan.runs])
    if experiment.analysis:
        analyse, folder = function(experiment.analysis), results.analysis(experiment.id)
        if experiment.readings:
            analyse(drawn, plan.content["views"], folder)
        else:
            traces = record_traces(plan.traced.values())
            analyse(plan.analysis, dict(zip(plan.traced, traces, strict=True)), folder)
        drawn = folder
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
    with refusing(f"no function {dotted}", ImportError, AttributeError, ValueError):
        return pkgutil.resolve_name(dotted)


@command("interrupted; complete runs are kept: call again to go on")
def main(words: Sequence[str] | None = None, conf: Path = CONF) -> None:
    """Carry the command out; exit 1 if something failed, 2 for bad input, 130 if interrupted."""
    doc = f"{__doc__}\nexperiments: all {' '.join(sweeps.available())}"
    options, others = words_given(doc, OPTIONS, words)
    if options["n_jobs"] < 1 or options["launcher"] not in LAUNCHERS:
        raise UserError(f"give n_jobs of 1 or more, and launcher={' or '.join(LAUNCHERS)}")
    ids = [word for word in others if "=" not in word and not word.startswith("~")]
    overrides = [word for word in others if word not in ids]
    overrides += model_of(overrides)
    sys.exit(Reproduction(ids, overrides, options, conf).carry_out())
