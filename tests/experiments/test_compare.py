"""One table of many runs, over the records that the project ships."""

from __future__ import annotations

import subprocess
import sys

from experiments.compare import find_records
from tests.command import ROOT


def compare(*folders: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.compare", *folders]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_record_is_a_row() -> None:
    records = find_records([ROOT / "results" / "baselines"])
    done = compare("results/baselines")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " mixtral " in line]
    assert len(rows) == len(records) == 33
    assert all(" yes " in row and "emulated" in row for row in rows)


def test_what_a_system_does_not_count_is_a_dash() -> None:
    done = compare("results/baselines/deepspeed_zero")
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if " deepspeed_zero " in line)
    assert row.count(" - ") == 5, "budget, hit, late, GB moved and the bound"


def test_a_folder_without_records_is_one_line_and_exit_code_2() -> None:
    done = compare("docs")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run.json under docs")
