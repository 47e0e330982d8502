"""The one entry: ``python run.py system=finemoe model=mixtral``; ``--help`` lists what exists."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
from omegaconf import DictConfig

from experiments.errors import BAD_INPUT, INTERRUPTED, UserError, say_starting

logging.getLogger("transformers").setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

STARTED, REFUSED = "started", "refused"


@dataclass(frozen=True)
class Outcome:
    """What jobs tell of a sweep, in a folder: a launcher may carry them out in other processes."""

    folder: Path

    def tell(self, what: str) -> None:
        """Let every process know; on another machine, which has no such folder, nothing happens."""
        with suppress(OSError):
            (self.folder / what).touch()

    def told(self, what: str) -> bool:
        """Return whether any job told so."""
        return (self.folder / what).exists()


def serve(cfg: DictConfig, outcome: Outcome) -> None:
    """Carry out one job, unless its complete record is already there."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from experiments.config import check

    outcome.tell(STARTED)
    hydra_job, single = HydraConfig.get().job, HydraConfig.get().mode == RunMode.RUN
    job = None if parent_process() is None else f"#{hydra_job.num} {cfg.system.label}"
    try:
        own = cfg.get("experiment")
        if own and (single or own.get("analysis") or own.get("cells")):
            told = f"experiment {own.id} is no single run"
            raise UserError(f"{told}; call python -m experiments.reproduce {own.id}")
        check(cfg)
        # What follows takes seconds to import.
        from experiments.console import Console
        from experiments.harness import run
        from experiments.records import REQUESTS, existing_record, read_record
        from experiments.tracking import log_record

        console = Console(job=job)
        held = existing_record(cfg)
        if held is not None:
            console.skipped(held)
        record = run(cfg, console) if held is None else read_record(held)
        folder = Path(cfg.output)
        if not (folder / "wandb").exists():
            log_record(cfg.logger, folder, record, folder / REQUESTS)
    except UserError as error:
        print(f"{job}: error: {error}" if job else f"error: {error}", file=sys.stderr)
        outcome.tell(REFUSED)
        if single:
            raise SystemExit(BAD_INPUT) from None


def main() -> None:
    """Run Hydra; exit 2 for bad input, 130 when interrupted."""
    say_starting()
    with TemporaryDirectory(prefix="finemoe-") as folder:
        conduct(Outcome(Path(folder)))


def conduct(outcome: Outcome) -> None:
    """Run Hydra; its jobs leave in `outcome` how they went."""

    @hydra.main(config_path="conf", config_name="config", version_base="1.3")
    def task(cfg: DictConfig) -> None:
        serve(cfg, outcome)

    try:
        task()
    except KeyboardInterrupt:
        print("interrupted; no record was written for this run", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:
        # Hydra exits with 1 for what it refuses before a job starts, such as an unknown option.
        if stop.code == 1 and not outcome.told(STARTED):
            raise SystemExit(BAD_INPUT) from None
        raise
    if outcome.told(REFUSED):
        raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    main()
