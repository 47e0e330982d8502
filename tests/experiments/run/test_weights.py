"""The fingerprint of weights, and what of them it is over."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from experiments.run import weights
from experiments.run.weights import fingerprint

MODEL = {"name": "toy", "hub_id": "someone/toy"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in two shards, with a predictor of its routing beside it."""
    folder = tmp_path / "toy"
    folder.mkdir()
    names = ("config.json", "model-1.safetensors", "model-2.safetensors", "predictor.safetensors")
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def of(folder: Path) -> str:
    return fingerprint(MODEL, str(folder), 0)


def test_every_file_of_the_model_counts_and_nothing_else(folder: Path) -> None:
    before = of(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes())
    (folder / "predictor.safetensors").write_bytes(b"another")
    assert fingerprint(MODEL, str(folder), 1) == of(folder) == before
    folder = folder.rename(folder.with_name("moved"))
    assert of(folder) == before
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        before = of(folder)
        (folder / name).write_bytes(b"!" * len(name))
        changed = of(folder)
        (folder / name).unlink()
        assert len({before, changed, of(folder)}) == 3


def test_a_large_file_is_told_by_its_change_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = of(folder)
    monkeypatch.setattr(weights, "LARGE", 0)
    weights._digest.cache_clear()
    large = of(folder)
    (folder / "config.json").touch()
    assert len({small, large, of(folder)}) == 3


def test_dummies_are_their_seed_and_hub_weights_the_revision_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--someone--toy" / "refs" / "main"
    marks = {fingerprint(MODEL, "dummy", seed) for seed in (0, 1, 1)}
    marks |= {fingerprint({**MODEL, "hub_id": one}, "hub", 0) for one in ("someone/toy", "other/x")}
    reference.parent.mkdir(parents=True)
    for revision in ("abc", "def"):
        reference.write_text(revision)
        marks.add(fingerprint(MODEL, "hub", 0))
    assert len(marks) == 6
