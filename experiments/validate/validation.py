"""Compare live runs with replays of their own routing: ``python -m experiments.validate``.

Every system serves the same prompts live, over emulated links, at every budget, and others while
its costs are observed; then the recorded routing is replayed in the virtual time of the testbed
that the observations make.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from yaml import YAMLError  # type: ignore[import-untyped]

from experiments.bench.overheads import write_json
from experiments.errors import UserError, command
from experiments.run import simulation
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.first_pass import first_pass
from experiments.run.harness import build_history, measure
from experiments.run.recording import record_setup
from experiments.run.records import provenance
from experiments.run.run_record import Measurement
from experiments.run.setup import prepare
from experiments.validate.calibrate import write_testbed
from experiments.validate.calibration import Calibration, as_run
from finemoe.testbed import SimulatedTestbed, Testbed
from finemoe.trace import TraceError, TraceReader

MOST_DEVIATION = 0.05
"""Largest acceptable deviation of a replay's TTFT and TPOT from the live run's."""


@dataclass(frozen=True)
class Result:
    """What one run measured; times are means over requests, in seconds."""

    ttft_s: float
    tpot_s: float
    hits: int
    late: int
    misses: int

    @classmethod
    def of(cls, measurement: Measurement) -> Result:
        """Return the result of a measurement whose answers are longer than one token."""
        tpots = [one.tpot for one in measurement.served if one.tpot is not None]
        ttft = statistics.fmean(one.ttft for one in measurement.served)
        found = measurement.accesses.total
        return cls(ttft, statistics.fmean(tpots), found.hits, found.late, found.misses)


@dataclass(frozen=True)
class Comparison:
    """One system at one budget (GB), live and replayed."""

    system: str
    budget: float
    live: Result
    """The middle one of the repeats, by TPOT; the faster of two."""
    replay: Result
    repeats: tuple[Result, ...] = ()
    """All live runs of it."""

    @classmethod
    def of(cls, run: DictConfig, repeats: Sequence[Result], replay: Result) -> Comparison:
        """Compare a replay with the middle repeat: its costs are means, of good and bad moments."""
        ranked = sorted(repeats, key=lambda one: one.tpot_s)
        live = ranked[(len(ranked) - 1) // 2]
        return cls(run.system.label, float(run.memory_budget), live, replay, tuple(repeats))

    @property
    def ttft_ratio(self) -> float:
        """Replay over live."""
        return self.replay.ttft_s / self.live.ttft_s

    @property
    def tpot_ratio(self) -> float:
        """Replay over live."""
        return self.replay.tpot_s / self.live.tpot_s

    @property
    def met(self) -> bool:
        """Whether both ratios keep the target."""
        return all(abs(r - 1) <= MOST_DEVIATION for r in (self.ttft_ratio, self.tpot_ratio))

    def plain(self) -> dict[str, Any]:
        ratios = {"ttft_ratio": self.ttft_ratio, "tpot_ratio": self.tpot_ratio}
        return {**asdict(self), **ratios, "met": self.met}


def validate(cfg: DictConfig, console: Console) -> tuple[list[Comparison], dict[str, Any]]:
    """Return all comparisons, and the calibrated testbed they used. Raises UserError."""
    testbed = _emulated(cfg)
    known = _known(cfg, testbed)
    calibration = None if known else Calibration(_calibrate_config(cfg), console)
    path = Path(cfg.output) / "trace.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(cfg.systems))
    record_setup(prepare(as_run(cfg, first, memory_budget="100%"), testbed), path, console)
    try:
        # All that needs a quiet machine first.
        rounds = [_round(cfg, testbed, calibration, console) for _ in range(cfg.repeats)]
        calibrated = calibration.testbed() if calibration else known
        virtual = build(OmegaConf.create(calibrated))
        with TraceReader(path) as trace:
            runs = [run for system in cfg.systems for run in _runs(cfg, system)]
            again = [_replay(run, virtual, trace, console) for run in runs]
    except TraceError as error:
        raise UserError(str(error)) from error
    finally:
        path.unlink(missing_ok=True)
    if calibration:
        write_testbed(Path(cfg.output) / "testbed.yaml", calibrated)
    lives = zip(*rounds, strict=True)
    return list(map(Comparison.of, runs, lives, again)), calibrated


def _emulated(cfg: DictConfig) -> Testbed:
    if cfg.workload.output_tokens < 2:
        raise UserError("workload.output_tokens: there is no TPOT below 2")
    if cfg.repeats < 1:
        raise UserError(f"repeats={cfg.repeats}: serve live at least once")
    testbed = build(cfg.testbed)
    if not isinstance(testbed, Testbed) or testbed.mode != "emulated":
        raise UserError("validate compares with an emulated testbed; use testbed=emulated")
    return testbed


def _runs(cfg: DictConfig, system: str) -> list[DictConfig]:
    return [as_run(cfg, system, memory_budget=budget) for budget in cfg.budgets]


def _round(
    cfg: DictConfig, testbed: Testbed, calibration: Calibration | None, console: Console
) -> list[Result]:
    """Serve every case live once; the machine's speed drifts, so costs are observed in between."""
    results = []
    if calibration:
        calibration.observe_resident()
    for system in cfg.systems:
        if calibration:
            calibration.observe(system)
        results += [_live(run, testbed, console) for run in _runs(cfg, system)]
    return results


def _live(run: DictConfig, testbed: Testbed, console: Console) -> Result:
    setup = prepare(run, testbed)
    build_history(setup, console)
    return Result.of(measure(setup, first_pass(setup, console), console))


def _replay(
    run: DictConfig, testbed: SimulatedTestbed, trace: TraceReader, console: Console
) -> Result:
    prepared = simulation.prepare(run, testbed, trace)
    simulation.teach(prepared, console)
    return Result.of(simulation.measure(prepared, console))


def _known(cfg: DictConfig, testbed: Testbed) -> dict[str, Any]:
    """Return the testbed of the file that the config names, if it names one."""
    if cfg.calibration is None:
        return {}
    path = Path(cfg.calibration)
    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        cause = str(error).splitlines()[0]
        raise UserError(
            f"calibration={path}: {cause}; run experiments.validate.calibrate"
        ) from error
    if not isinstance(loaded, dict) or "compute_us" not in loaded:
        raise UserError(
            f"calibration={path} is no file of experiments.validate.calibrate; make one"
        )
    link = loaded["link"]
    if (link["gb_s"], link["time_scale"]) != (testbed.link_gb_s, testbed.time_scale):
        raise UserError(
            f"calibrated for links of {link['gb_s']} GB/s at time scale {link['time_scale']}, not "
            f"{testbed.link_gb_s} at {testbed.time_scale}; set calibration=null"
        )
    return loaded


def _calibrate_config(cfg: DictConfig) -> DictConfig:
    """Return conf/calibrate.yaml with this command's model, testbed and systems."""
    asked = cfg.calibrate
    chosen: Any = compose("calibrate", [f"dataset={asked.dataset}"])
    OmegaConf.set_struct(chosen, False)
    for group in ("model", "testbed", "systems"):
        chosen[group] = cfg[group]
    chosen.weights, chosen.seed = cfg.weights, asked.seed
    chosen.memory_budgets = asked.memory_budgets
    chosen.workload.prompts = asked.prompts
    chosen.workload.output_tokens = asked.output_tokens
    return chosen


# Reports ------------------------------------------------------------------------------------------


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return one row a comparison."""
    rows = Table(title="replay against live (emulated)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows.add_column("system", no_wrap=True)
    for column in ("GB", "TTFT ms", "replay", "ratio", "TPOT ms", "replay", "ratio", "5 %"):
        rows.add_column(column, justify="right", no_wrap=True)
    for one in comparisons:
        rows.add_row(
            one.system,
            f"{one.budget:g}",
            *_times(one.live.ttft_s, one.replay.ttft_s),
            *_times(one.live.tpot_s, one.replay.tpot_s),
            "[green]met[/]" if one.met else "[red]no[/]",
        )
    return rows


def _times(live: float, again: float) -> tuple[str, str, str]:
    return f"{live * 1e3:.1f}", f"{again * 1e3:.1f}", f"{again / live:.3f}"


@hydra.main(config_path="../../conf", config_name="validate", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Validate as the config says; exit 2 for bad input. Nothing fails because of a time."""
    transformers.logging.disable_progress_bar()
    comparisons, calibrated = validate(cfg, Console())
    RichConsole().print(table(comparisons))
    met = sum(one.met for one in comparisons)
    print(f"TTFT and TPOT within 5 %: {met} of {len(comparisons)}")
    path = Path(cfg.output) / "validate.json"
    record = {
        "comparisons": [one.plain() for one in comparisons],
        "most_deviation": MOST_DEVIATION,
        "testbed": calibrated,
        "config": OmegaConf.to_container(cfg, resolve=True),
        **provenance(),
    }
    write_json(path, record)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
