"""One table of many runs, over the records that the project ships."""

import re

import pytest

from experiments.judge.compare import find_records
from tests.command import ROOT, refusal, run_module

COMMAND = "experiments.judge.compare"


def test_every_record_is_a_row_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_folder_without_records_is_one_line_and_exit_code_2() -> None:
    assert "no run.json under docs" in refusal(run_module(COMMAND, "docs"))
