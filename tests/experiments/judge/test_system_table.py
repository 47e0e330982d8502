"""What the systems did, in numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.judge.system_table import system_table
from tests.experiments.judge.test_claims import Results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "results")


def test_a_row_sums_a_system_over_its_runs(results: Results) -> None:
    phases = {"on_demand_wait": 4.0, "prefetch_wait": 1.0, "search": 2.0, "update": 0.5}
    results.experiment(
        "10",
        results.run("promoe", hits=[8, 8, 8], summary={"phase_seconds": phases}),
        results.run("promoe", hits=[2, 2, 2], dataset="code", summary={"phase_seconds": phases}),
        results.run("finemoe", summary={"bytes_prefetched": 9_390_000_000_000, "bound": None}),
    )
    promoe, finemoe = system_table(results.folder.runs_of("10")).to_dict("records")
    # Two runs of 30 experts asked for and 10 s each; 3 requests each; bounds 8 and 2 s.
    assert tuple(promoe.values()) == (
        "ProMoE", "50.0", "10.0", "40.0", "1", "50.0", "2", "40.0", "10.0", "25.0", "80.0", "20.0",
    )  # fmt: skip
    # A large number has no exponent, and what no record has is left empty.
    assert (finemoe["ahead, GB"], finemoe["least loads, %"]) == ("3,130", "")


def test_a_system_is_told_apart_by_the_option_that_differs(results: Results) -> None:
    results.experiment(
        "14a",
        results.run("finemoe", options={"search": "both", "eviction": "lru"}),
        results.run("finemoe", options={"search": "semantic", "eviction": "lru"}),
    )
    table = system_table(results.folder.runs_of("14a"))
    assert [*table["system"]] == ["FineMoE (search=both)", "FineMoE (search=semantic)"]


def test_no_runs_no_table(results: Results) -> None:
    assert system_table(results.folder.runs_of("10")).empty
