"""Where reproduced results lie: runs by digest, shared by all figures, and what was made of them.

<results>/runs/<digest>/run.json, requests.parquet    one run
<results>/analysis/<id>/                              one analysis of routing traces
<results>/figures/<id>.png, .pdf, .csv, .txt          what was drawn
<results>/experiments/<id>.json                       an experiment: written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.reproduce.sweeps import digest
from experiments.run.records import (
    INDEX,
    RECORD,
    REQUESTS,
    of_these_weights,
    provenance,
    read_checked,
    read_record,
)
from finemoe.files import atomic_write

ERROR = "error.txt"
AUTO, SIMULATED = "experiments.run.testbeds.auto", "experiments.run.testbeds.simulated"


@dataclass(frozen=True)
class RunStore:
    """A results folder."""

    root: Path

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def run(self, identity: str) -> Path:
        """Return the folder of the run with this digest."""
        return self.root / "runs" / identity

    def record(self, identity: str) -> Path:
        """Return the record of the run with this digest, which may not be there."""
        return self.run(identity) / RECORD

    def analysis(self, name: str) -> Path:
        """Return the folder of an analysis."""
        return self.root / "analysis" / name

    def place(self, cfg: DictConfig) -> str:
        """Send the config's output to its folder; return its digest."""
        identity = digest(cfg)
        cfg.output = str(self.run(identity))
        return identity

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
            identity = digest(_as_simulated(record))
            if identity in wanted and not self.record(identity).exists():
                self._copy(path.parent, identity)
                adopted += 1
        return adopted

    def _copy(self, source: Path, identity: str) -> None:
        """Copy a run, its record last."""
        for name in (REQUESTS, RECORD):
            with atomic_write(self.run(identity) / name) as partial:
                shutil.copyfile(source / name, partial)

    # Experiments ------------------------------------------------------------------------------

    def experiment(self, name: str) -> Path:
        """Return the file that says what an experiment consists of."""
        return self.root / "experiments" / f"{name}.json"

    def made(self, name: str, source: str) -> bool:
        """Tell whether the experiment was made of this source, and all it left is still there.

        Raises UserError if a record of its runs is malformed.
        """
        try:
            held = read_checked(self.experiment(name), INDEX, "experiment record")
        except UserError:
            return False
        files = [self.root / one for one in held.get("files", ())]
        records = [self.record(one) for one in held.get("runs", ())]
        if held.get("source") != source or not all(one.exists() for one in (*files, *records)):
            return False
        for path in records:
            read_record(path)
        return True

    def write_experiment(self, name: str, content: Mapping[str, Any]) -> None:
        """Mark an experiment complete, with the files that it left."""
        left = (*self.figures.glob(f"{name}.*"), *self.analysis(name).glob("*"))
        files = sorted(str(path.relative_to(self.root)) for path in left)
        whole = {**content, "files": files, "provenance": provenance()}
        with atomic_write(self.experiment(name)) as partial:
            partial.write_text(json.dumps(whole, indent=1) + "\n")


def _as_simulated(record: Mapping[str, Any]) -> DictConfig:
    """Return a record's config, with testbed=auto replaced by what it came to."""
    cfg = OmegaConf.create(record["config"])
    if record["mode"] == "simulated" and cfg.testbed.get("_target_") == AUTO:
        cfg.testbed._target_ = SIMULATED
    return cfg
