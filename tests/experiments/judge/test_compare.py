"""One table of many runs, over the records that the project ships."""

import re

import pytest

from experiments.judge.compare import find_records
from tests.command import ROOT, refusal, run_module

COMMAND = "experiments.judge.compare"


def test_every_record_is_a_row_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_module(COMMAND, "results/baselines").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    # An option that is not at today's default has a line of its own.
    rows = [line for line in lines if re.search(r"\d\.\d +\d+\.\d ", line)]
    assert len(rows) == len(find_records([ROOT / "results" / "baselines"])) == 33


def test_a_folder_without_records_is_one_line_and_exit_code_2() -> None:
    assert "no run.json under docs" in refusal(run_module(COMMAND, "docs"))
