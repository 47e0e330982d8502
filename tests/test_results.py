"""The committed results are what the command makes: two small figures are made again."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra.utils import get_method
from PIL import Image

from experiments.errors import UserError
from experiments.judge.claims import judge
from experiments.judge.frame import ResultsFolder
from experiments.reproduce.sweeps import Experiment, available
from experiments.run.records import RUNS, pack_runs, unpack_runs
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
def committed(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    return ResultsFolder(linked(RESULTS, tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    return ResultsFolder(linked(RESULTS / "beyond", tmp_path_factory.mktemp("beyond")))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("one", available().values(), ids=lambda one: one.id)
def test_committed_figures(
    one: Experiment, committed: ResultsFolder, beyond: ResultsFolder, tmp_path: Path
) -> None:
    """To the digits that another processor computes alike."""
    results, folder = (beyond, RESULTS / "beyond") if one.beyond else (committed, RESULTS)
    runs = results.runs_of(one.id)
    assert len(runs) == len(results.index(one.id).get("runs", ()))
    assert set(runs.get("mode", ())) <= {"simulated"}
    get_method(one.draws)(results.analysis(one.id) if one.analysis else runs, tmp_path)
    assert np.asarray(Image.open(tmp_path / f"{one.id}.png").convert("L")).std() > 1
    assert "Mode: " in (tmp_path / f"{one.id}.txt").read_text()
    mine, theirs = (pd.read_csv(at / f"{one.id}.csv") for at in (tmp_path, folder / "figures"))
    pd.testing.assert_frame_equal(mine, theirs, check_dtype=False, rtol=1e-9)


def test_archives_repeat_or_are_refused(committed: ResultsFolder, tmp_path: Path) -> None:
    for folder in sorted((committed.root / "runs").iterdir())[:3]:
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


def test_committed_verdicts_are_those_of_the_committed_records(committed: ResultsFolder) -> None:
    """To the digits that another processor computes alike."""
    judge(committed)
    mine, theirs = (pd.read_csv(one / "claims.csv") for one in (committed.root, RESULTS))
    assert len(theirs) > 50
    pd.testing.assert_frame_equal(mine, theirs, check_dtype=False, rtol=1e-9)
