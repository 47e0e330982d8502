"""What a results folder holds as evidence: run records by experiment, and analysis tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.errors import UserError
from experiments.records import (
    ANALYSIS,
    INDEX,
    RECORD,
    read_checked,
    read_record,
    read_requests,
    read_table,
)

SETTINGS = {
    "memory_budget": "memory_budget",
    "batch_size": "workload.batch_size",
    "prefetch_distance": "system.prefetch_distance",
    "store_capacity": "system.store_capacity",
}
"""Short names of settings, and where a config has them; other names are dotted paths."""


@dataclass(frozen=True)
class Run:
    """One complete run record."""

    digest: str
    folder: Path
    record: Mapping[str, Any]

    @property
    def cell(self) -> tuple[str, str]:
        """Model and dataset."""
        return self.record["model"], self.record["dataset"]

    @property
    def summary(self) -> Mapping[str, Any]:
        return self.record["summary"]

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a served request; UserError if the table is missing or unreadable."""
        return read_requests(self.folder / RECORD)

    def setting(self, name: str) -> Any:
        """Return a setting by short name or dotted path; None where the config has none.

        `system`, `model`, `dataset` and `memory_budget_gb` are what the record says of them.
        """
        if name in ("system", "model", "dataset", "memory_budget_gb"):
            return self.record[name]
        found: Any = self.record["config"]
        for key in SETTINGS.get(name, name).split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Tell whether every setting asked for is as asked."""
        return all(_same(self.setting(name), value) for name, value in wanted.items())


def _same(found: Any, wanted: Any) -> bool:
    try:
        return abs(float(found) - float(wanted)) < 1e-6
    except (TypeError, ValueError):
        return str(found) == str(wanted)


@dataclass(frozen=True)
class Table:
    """One CSV of an analysis."""

    digest: str
    rows: pd.DataFrame
    mode: str


class Evidence:
    """Reads a results folder; what was read once is kept."""

    def __init__(self, results: Path) -> None:
        if not results.is_dir():
            raise UserError(
                f"{results}: no such folder; run `python -m experiments.reproduce all` first"
            )
        self.results = results
        self._runs: dict[str, Run | None] = {}

    def runs(self, experiment: str) -> list[Run]:
        """Return an experiment's complete runs, without those that are missing."""
        digests = dict.fromkeys(self.index(experiment).get("runs", ()))
        return [run for digest in digests if (run := self._run(digest)) is not None]

    def index(self, experiment: str) -> dict[str, Any]:
        """Return what an experiment consists of, empty where it was not made."""
        path = self.results / "experiments" / f"{experiment}.json"
        due = "experiment record; remove it and draw again"
        return read_checked(path, INDEX, due) if path.exists() else {}

    def _run(self, digest: str) -> Run | None:
        if digest not in self._runs:
            path = self.results / "runs" / digest / RECORD
            found = Run(digest, path.parent, read_record(path)) if path.exists() else None
            self._runs[digest] = found
        return self._runs[digest]

    def every_run(self) -> list[Run]:
        """Return all complete runs, those of no experiment as well, by digest."""
        folders = sorted(path.parent.name for path in (self.results / "runs").glob(f"*/{RECORD}"))
        return [run for digest in folders if (run := self._run(digest)) is not None]

    def table(self, experiment: str, name: str) -> Table | None:
        """Return a table of an analysis; None if the analysis is missing or has no such table."""
        path = self.results / "analysis" / experiment / f"{name}.csv"
        record = self.analysis_record(experiment)
        if not record or not path.exists():
            return None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Table(digest, read_table(path), record["mode"])

    def analysis_record(self, experiment: str) -> dict[str, Any]:
        """Return an analysis's record, empty where there is none."""
        path = self.results / "analysis" / experiment / "record.json"
        due = "analysis record; remove it and analyse again"
        return read_checked(path, ANALYSIS, due) if path.exists() else {}
