"""The committed results are what the command makes: two small figures are made again."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.judge.claims import judge
from experiments.judge.frame import ResultsFolder
from tests.command import ROOT, run_module

RESULTS = ROOT / "results"


def test_small_figures_made_again_equal_the_committed_ones(tmp_path: Path) -> None:
    done = run_module("experiments.reproduce", "table1", "18", f"results={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("table1", "18"):
        made, committed = (folder / "figures" / f"{name}.csv" for folder in (tmp_path, RESULTS))
        assert made.read_text() == committed.read_text()
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0


def test_every_committed_figure_stands_on_committed_records() -> None:
    experiments = sorted((RESULTS / "experiments").glob("*.json"))
    assert len(experiments) == len(list((ROOT / "conf" / "experiment").glob("*.yaml")))
    for path in experiments:
        for digest in json.loads(path.read_text()).get("runs", []):
            record = json.loads((RESULTS / "runs" / digest / "run.json").read_text())
            assert record["status"] == "complete"
            assert record["mode"] == "simulated"


def test_committed_verdicts_are_those_of_the_committed_records(tmp_path: Path) -> None:
    for name in ("runs", "experiments", "analysis"):
        (tmp_path / name).symlink_to(RESULTS / name)
    judge(ResultsFolder(tmp_path))
    for name in ("claims.json", "claims.csv"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()
