"""The one entry: ``python run.py system=finemoe model=mixtral``; ``--help`` lists what exists."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

logging.getLogger("transformers").setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

BAD_INPUT, INTERRUPTED = 2, 130


class Outcome:
    """Whether the task was entered, and whether any job of a sweep had bad input."""

    started = False
    bad_input = False


def serve(cfg: DictConfig, outcome: Outcome) -> None:
    """Carry out one job, unless its complete record is already there."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from experiments.console import Console
    from experiments.errors import UserError
    from experiments.harness import run
    from experiments.records import REQUESTS, existing_record, read_record
    from experiments.tracking import log_record

    outcome.started = True
    console = Console()
    try:
        held = existing_record(cfg)
        if held is not None:
            console.skipped(held)
        record = run(cfg, console) if held is None else read_record(held)
        folder = Path(cfg.output)
        if not (folder / "wandb").exists():
            log_record(cfg.logger, folder, record, folder / REQUESTS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        outcome.bad_input = True
        if HydraConfig.get().mode == RunMode.RUN:
            raise SystemExit(BAD_INPUT) from None


def main() -> None:
    """Run Hydra; exit 2 for bad input, 130 when interrupted."""
    outcome = Outcome()

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
        if stop.code == 1 and not outcome.started:
            raise SystemExit(BAD_INPUT) from None
        raise
    if outcome.bad_input:
        raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    main()
