"""The committed results are what the command makes: two small figures are made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.errors import UserError
from experiments.judge.claims import judge
from experiments.judge.frame import ResultsFolder
from experiments.run.records import RUNS, pack_runs, read_record, unpack_runs
from tests.command import ROOT, run_module

RESULTS = ROOT / "results"


def test_small_figures_made_again_equal_the_committed_ones(tmp_path: Path) -> None:
    done = run_module("experiments.reproduce", "table1", "18", f"results={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("table1", "18"):
        made, committed = (folder / "figures" / f"{name}.csv" for folder in (tmp_path, RESULTS))
        assert made.read_text() == committed.read_text()
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0


def linked(results: Path, folder: Path) -> Path:
    """Return a folder with the content of committed results, their runs out of the archive."""
    for name in ("experiments", "analysis", RUNS):
        (folder / name).symlink_to(results / name)
    unpack_runs(folder)
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(RESULTS, tmp_path_factory.mktemp("results"))


def test_every_committed_figure_stands_on_records_of_its_archive(
    unpacked: Path, tmp_path: Path
) -> None:
    folders = unpacked, linked(RESULTS / "beyond", tmp_path)
    indices = [path for one in folders for path in one.glob("experiments/*.json")]
    assert len(indices) == len([*(ROOT / "conf" / "experiment").glob("*.yaml")])
    for path in indices:
        for digest in json.loads(path.read_text()).get("runs", []):
            record = read_record(path.parent.parent / "runs" / digest / "run.json")
            assert record["mode"] == "simulated"


def test_runs_are_packed_into_the_same_bytes_and_a_damaged_archive_is_refused(
    unpacked: Path, tmp_path: Path
) -> None:
    for folder in sorted((unpacked / "runs").iterdir())[:3]:
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    pack_runs(tmp_path)
    archive = (tmp_path / RUNS).read_bytes()
    shutil.rmtree(tmp_path / "runs")
    unpack_runs(tmp_path)
    pack_runs(tmp_path)
    assert (tmp_path / RUNS).read_bytes() == archive
    (tmp_path / RUNS).write_bytes(archive[: len(archive) // 2])
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match="is damaged"):
        unpack_runs(tmp_path)
    assert not (tmp_path / "runs").exists()


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested data by their paths."""
    if not isinstance(value, dict | list):
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for name, one in items for path, leaf in flat(one, f"{key}.{name}").items()}


def test_committed_verdicts_are_those_of_the_committed_records(unpacked: Path) -> None:
    """To the digits that another processor computes alike."""
    judge(ResultsFolder(unpacked))
    made, committed = (
        flat(json.loads((folder / "claims.json").read_text())) for folder in (unpacked, RESULTS)
    )
    assert made.keys() == committed.keys()
    numbers = {key for key, value in committed.items() if isinstance(value, float)}
    assert len(numbers) > 100
    assert {key: made[key] for key in numbers} == pytest.approx(
        {key: committed[key] for key in numbers}, rel=1e-9
    )
    assert all(made[key] == committed[key] for key in committed.keys() - numbers)
    mine, theirs = (pd.read_csv(folder / "claims.csv") for folder in (unpacked, RESULTS))
    pd.testing.assert_frame_equal(mine, theirs, rtol=1e-9)
