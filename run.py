"""The one entry: ``python run.py system=finemoe model=mixtral``; ``--help`` lists what exists."""

import logging
import os
import sys
from contextlib import suppress
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
from hydra.conf import HydraConf
from omegaconf import DictConfig

from experiments.errors import BAD_INPUT, UserError, command, file_errors, say_starting
from experiments.reproduce.parallel import end_workers_with_this_process

logging.getLogger("transformers").setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Hydra raises what it refuses, instead of printing several lines of it.
os.environ["HYDRA_FULL_ERROR"] = "1"

REFUSED = "FINEMOE_REFUSED"  # names a file that jobs leave when they are refused


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def serve(cfg: DictConfig) -> None:
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
            raise UserError(f"no single run; call python -m experiments.reproduce {own.id}")
        with file_errors():
            check(cfg)
            cfg.output = cfg.output or str(output_folder(chosen, single))
            # What follows takes seconds to import.
            from experiments.run.console import Console
            from experiments.run.protocol import ensure_record

            ensure_record(cfg, Console(job=job))
    except UserError as error:
        print(f"{job}: error: {error}" if job else f"error: {error}", file=sys.stderr)
        # Another machine has no such folder.
        with suppress(OSError):
            Path(os.environ[REFUSED]).touch()


def output_folder(chosen: HydraConf, single: bool) -> Path:
    """Return what hydra.run.dir or hydra.sweep.subdir names, or a folder of the job's own."""
    from experiments.run.records import new_folder, sweep_folder

    parent = "." if single else chosen.sweep.dir
    if chosen.runtime.output_dir != os.path.abspath(parent):
        return Path(chosen.runtime.output_dir)
    if single:
        return new_folder(Path("outputs"))
    return sweep_folder(Path(parent), chosen.job.override_dirname)


@command("interrupted; complete runs are kept: start again to go on")
def main() -> None:
    """Run Hydra; exit 2 for bad input, 130 when interrupted, 143 when terminated."""
    from experiments.run.weights import model_of

    say_starting()
    end_workers_with_this_process()
    sys.argv += model_of(sys.argv[1:])
    with TemporaryDirectory() as folder:
        os.environ[REFUSED] = refused = os.path.join(folder, "refused")
        serve()
        if os.path.exists(refused):
            raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    main()
