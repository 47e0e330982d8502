"""Measure what serving costs here: ``python -m experiments.validate.calibrate output=FILE``.

Serves a few prompts of their own with the live runtime and writes a testbed in which the same
hardware runs in virtual time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import transformers
from omegaconf import DictConfig, OmegaConf

from experiments.errors import command
from experiments.run.console import Console
from experiments.run.records import provenance
from experiments.validate.calibration import Calibration
from finemoe.files import atomic_write


def calibrate(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Measure and return the testbed as conf/testbed would hold it. Raises UserError."""
    calibration = Calibration(cfg, console)
    calibration.observe_resident()
    for system in cfg.systems:
        calibration.observe(system)
    return calibration.testbed()


def write_testbed(path: Path, testbed: dict[str, Any]) -> None:
    """Write the YAML, whole or not at all, with where it comes from in comments."""
    origin = provenance()
    head = (
        f"# Measured by python -m experiments.validate.calibrate, {origin['date']}, "
        f"commit {origin['git_commit']},\n# on {origin['machine']['cpu']}, "
        f"{origin['machine']['cores']} cores. Times in microseconds.\n"
    )
    with atomic_write(path) as partial:
        partial.write_text(head + OmegaConf.to_yaml(OmegaConf.create(testbed)))


@hydra.main(config_path="../../conf", config_name="calibrate", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Calibrate as the config says; exit 2 for bad input."""
    transformers.logging.disable_progress_bar()
    path = Path(cfg.output)
    write_testbed(path, calibrate(cfg, Console()))
    print(f"written to {path}; testbed={path.stem} if it lies in conf/testbed")


if __name__ == "__main__":
    main()
