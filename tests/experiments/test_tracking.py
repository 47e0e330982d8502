"""What a reproduction leaves with Weights & Biases, offline, with the real package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from experiments.tracking import log_reproduction
from tests.command import ROOT


def test_figures_and_claims_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "figures").mkdir()
    shutil.copy(ROOT / "results" / "figures" / "18.png", tmp_path / "figures")
    shutil.copy(ROOT / "results" / "claims.csv", tmp_path)
    log_reproduction("finemoe", tmp_path)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert list(run.glob("*.wandb"))
    assert list((run / "files" / "media" / "images").glob("figure 18*"))
    (claims,) = (run / "files" / "media" / "table").glob("claims*.json")
    assert "headline-latency" in claims.read_text()
