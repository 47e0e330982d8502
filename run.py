"""The one entry: ``python run.py system=finemoe model=mixtral``; ``--help`` lists what exists."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from tempfile import gettempdir

import hydra
from hydra.conf import HydraConf
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import (
    BAD_INPUT,
    UserError,
    config_error,
    exit_code,
    file_errors,
    say_starting,
    stop,
)
from experiments.reproduce.parallel import end_workers_with_this_process
from finemoe.files import partial_name

logging.getLogger("transformers").setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Hydra raises what it refuses, instead of printing several lines of it.
os.environ["HYDRA_FULL_ERROR"] = "1"

RECORDED, REFUSED = "recorded", "refused"


@dataclass(frozen=True)
class Outcome:
    """What jobs tell of a sweep, in a file: a launcher may carry them out in other processes."""

    path: Path

    def tell(self, what: str) -> None:
        """Let every process know; on another machine, which has no such folder, nothing happens."""
        with suppress(OSError), self.path.open("a") as file:
            file.write(f"{what}\n")

    def told(self, what: str) -> int:
        """Return how many jobs told so."""
        return self.path.read_text().splitlines().count(what) if self.path.exists() else 0


def serve(cfg: DictConfig, outcome: Outcome) -> None:
    """Carry out one job, unless its complete record is already there."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from experiments.run.config import check

    chosen = HydraConfig.get()
    single = chosen.mode == RunMode.RUN
    job = None if parent_process() is None else f"#{chosen.job.num} {cfg.system.label}"
    try:
        own = cfg.get("experiment")
        if own and (single or own.get("analysis") or own.get("cells")):
            told = f"experiment {own.id} is no single run"
            raise UserError(f"{told}; call python -m experiments.reproduce {own.id}")
        with file_errors():
            check(cfg)
            cfg.output = cfg.output or str(output_folder(chosen, single))
            # What follows takes seconds to import.
            from experiments.reproduce.run_store import ensure_record, log
            from experiments.run.console import Console

            record = ensure_record(cfg, Console(job=job))
            outcome.tell(RECORDED)
            log(cfg, record)
    except UserError as error:
        print(f"{job}: error: {error}" if job else f"error: {error}", file=sys.stderr)
        outcome.tell(REFUSED)
        if single:
            raise SystemExit(BAD_INPUT) from None


def output_folder(chosen: HydraConf, single: bool) -> Path:
    """Return what hydra.run.dir or hydra.sweep.subdir names, or a folder of the job's own."""
    from experiments.run.records import new_folder, sweep_folder

    parent = "." if single else chosen.sweep.dir
    if chosen.runtime.output_dir != os.path.abspath(parent):
        return Path(chosen.runtime.output_dir)
    if single:
        return new_folder(Path("outputs"))
    return sweep_folder(Path(parent), chosen.job.override_dirname)


def main() -> None:
    """Run Hydra; exit 2 for bad input, 130 when interrupted, 143 when terminated."""
    say_starting()
    signal.signal(signal.SIGTERM, stop)
    end_workers_with_this_process()
    outcome = Outcome(partial_name(Path(gettempdir()) / "finemoe"))
    try:
        conduct(outcome)
    finally:
        outcome.path.unlink(missing_ok=True)


def conduct(outcome: Outcome) -> None:
    """Run Hydra; its jobs leave in `outcome` how they went."""

    @hydra.main(config_path="conf", config_name="config", version_base="1.3")
    def task(cfg: DictConfig) -> None:
        serve(cfg, outcome)

    try:
        with file_errors():
            task()
    except KeyboardInterrupt as interrupt:
        done = outcome.told(RECORDED)
        print(f"interrupted; complete runs: {done}; start again to go on", file=sys.stderr)
        raise SystemExit(exit_code(interrupt)) from None
    except (UserError, HydraException, OmegaConfBaseException) as error:
        cause = error if isinstance(error, UserError) else config_error(error)
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    if outcome.told(REFUSED):
        raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    main()
