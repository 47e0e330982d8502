"""Compare live runs with replays of their own routing: ``python -m experiments.validate``."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import pandas as pd
import transformers
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from experiments.errors import UserError, command, refusing
from experiments.run import replay
from experiments.run.config import build, run_config
from experiments.run.console import Console
from experiments.run.live import load_setup
from experiments.run.protocol import Setup, access_table, build_history, counted, measure
from experiments.run.records import provenance
from experiments.validate.calibrate import Calibration, emulated_testbed, write_testbed
from finemoe.files import write_json
from finemoe.testbed import Testbed

MOST_DEVIATION = 0.05  # largest acceptable, of a replay's TTFT and TPOT from the live run's
Result = dict[str, float]  # means over requests in s, and accesses


def validate(cfg: DictConfig, console: Console) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return all comparisons, and the testbed they used. Raises UserError or TraceError."""
    if cfg.workload.output_tokens < 2:
        raise UserError("workload.output_tokens: there is no TPOT below 2")
    if cfg.repeats < 1:
        raise UserError(f"repeats={cfg.repeats}: serve live at least once")
    testbed = emulated_testbed(cfg)
    known: dict[str, Any] = _calibrated(cfg, testbed) if cfg.calibration else {}
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    calibrate = OmegaConf.create({**settings, **settings["calibrate"]})
    calibration = None if known else Calibration(calibrate, console)
    runs = {
        system: [run_config(cfg, system, memory_budget=budget) for budget in cfg.budgets]
        for system in cfg.systems
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        resident = run_config(cfg, next(iter(cfg.systems)), memory_budget="100%")
        load_setup(resident, testbed).record_routing(path, console)
        # All that needs a quiet machine first; its speed drifts, so costs are observed in between.
        rounds: list[list[Result]] = [[] for _ in range(cfg.repeats)]
        for served in rounds:
            if calibration:
                calibration.observe_resident()
            for system, of_system in runs.items():
                if calibration:
                    calibration.observe(system)
                served += [_served(load_setup(run, testbed), console) for run in of_system]
        calibrated = calibration.testbed() if calibration else known
        virtual = build(OmegaConf.create(calibrated))
        each = list(chain.from_iterable(runs.values()))
        replays = []
        for one in each:
            one.routing = str(path)
            with replay.prepare(one, virtual, console) as setup:
                replays.append(_served(setup, console))
    if calibration:
        write_testbed(Path(cfg.output) / "testbed.yaml", calibrated)
    lives = zip(*rounds, strict=True)
    return list(map(comparison, each, lives, replays)), calibrated


def _calibrated(cfg: DictConfig, testbed: Testbed) -> dict[str, Any]:
    """Return the testbed of the file that the config names, if it is of the same links."""
    path = Path(cfg.calibration)
    what = f"calibration={path} is no file of experiments.validate.calibrate"
    with refusing(what, OSError, YAMLError, OmegaConfBaseException, LookupError, TypeError):
        loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
        link, _ = loaded["link"], loaded["compute_us"]
    if (link["gb_s"], link["time_scale"]) != (testbed.link_gb_s, testbed.time_scale):
        raise UserError(
            f"calibrated for links of {link['gb_s']} GB/s at time scale {link['time_scale']}, not "
            f"{testbed.link_gb_s} at {testbed.time_scale}; set calibration=null"
        )
    return loaded


def _served(setup: Setup, console: Console) -> Result:
    build_history(setup, console)
    measured = measure(setup, setup.reference(console), console)
    return {
        "ttft_s": fmean(one.ttft for one in measured.served),
        "tpot_s": fmean(one.tpot for one in measured.served if one.tpot is not None),
        **counted(access_table(measured.accesses)),
    }


def comparison(run: DictConfig, repeats: Sequence[Result], replay: Result) -> dict[str, Any]:
    """Compare a replay with the middle one, by TPOT, of a system's live runs at one budget."""
    ranked = sorted(repeats, key=lambda one: one["tpot_s"])
    live = ranked[(len(ranked) - 1) // 2]
    ratios = {f"{time}_ratio": replay[f"{time}_s"] / live[f"{time}_s"] for time in ("ttft", "tpot")}
    return {
        "system": run.system.label,
        "budget": float(run.memory_budget),
        "live": live,
        "replay": replay,
        "repeats": list(repeats),
        **ratios,
        "met": all(abs(ratio - 1) <= MOST_DEVIATION for ratio in ratios.values()),
    }


@hydra.main(config_path="../../conf", config_name="validate", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Validate as the config says; exit 2 for bad input. Nothing fails because of a time."""
    transformers.logging.disable_progress_bar()
    comparisons, calibrated = validate(cfg, Console())
    rows = pd.json_normalize(comparisons, sep=" ").filter(regex="system|budget|_s$|_ratio|met")
    print(rows.to_string(index=False, float_format="{:.4g}".format))
    met = sum(one["met"] for one in comparisons)
    print(f"TTFT and TPOT within 5 %: {met} of {len(comparisons)}")
    path = Path(cfg.output) / "validate.json"
    record = {
        "comparisons": comparisons,
        "most_deviation": MOST_DEVIATION,
        "testbed": calibrated,
        "config": OmegaConf.to_container(cfg, resolve=True),
        **provenance(),
    }
    write_json(path, record)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
