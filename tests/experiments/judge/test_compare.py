"""One table of many runs, over the records that the project ships."""

import json
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from experiments.judge.compare import find_records
from tests.command import ROOT, run_module

COMMAND = "experiments.judge.compare"
SHIPPED = ROOT / "results" / "baselines" / "finemoe-6" / "run.json"


def leave(folder: Path, **changed: Any) -> None:
    """Leave a shipped record with entries changed; dots lead into what is nested."""
    record = json.loads(SHIPPED.read_text())
    for path, value in changed.items():
        *outer, name = path.split(".")
        reduce(getitem, outer, record)[name] = value
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))


def test_every_record_is_a_row_that_fits_and_what_is_common_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    records = find_records([ROOT / "results" / "baselines"])
    done = run_module(COMMAND, "results/baselines")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = lines[lines.index(next(line for line in lines if "───" in line)) + 1 :]
    # An option that is not at today's default has a line of its own.
    found = [row for row in rows if re.search(r"\d\.\d +\d+\.\d ", row)]
    assert len(found) == len(records) == 33
    assert done.stdout.count("model mixtral,") == done.stdout.count("emulated") / 2 == 1


def test_points_of_a_sweep_are_told_apart_by_whatever_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"config.seed": (0, 1), "config.workload.batch_size": (1, 2)}
    settings |= {"config.store.load": (None, "a_store"), "config.testbed.time_scale": (0.1, 0.2)}
    for number in range(2):
        changed = {path: values[number] for path, values in settings.items()}
        leave(tmp_path / f"{number}", **changed)
    printed = []
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        printed.append(run_module(COMMAND, str(tmp_path)).stdout)
    narrow, wide = printed
    assert max(map(len, narrow.splitlines())) <= 80
    assert {"seed=0", "batch_size=1", "load=null", "time_scale=0.1"} <= set(narrow.split())
    rows = [line.split()[:4] for line in wide.splitlines()]
    assert ["seed", "batch_size", "time_scale", "load"] in rows
    assert ["1", "2", "0.2", "a_store"] in rows


def test_a_folder_without_records_is_one_line_and_exit_code_2() -> None:
    done = run_module(COMMAND, "docs")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run.json under docs")
