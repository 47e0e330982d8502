"""The fingerprint of weights, and what of them it is over."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from experiments.run import weights
from experiments.run.weights import fingerprint
from tests.command import python

MODEL = {"name": "toy", "hub_id": "someone/toy"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in two shards, with a predictor of its routing beside it."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name in (
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "predictor.safetensors",
    ):
        (folder / name).write_bytes(name.encode())
    return folder


def of(folder: Path) -> str:
    return fingerprint(MODEL, str(folder), 0)


@pytest.mark.parametrize("name", ["config.json", "model-1.safetensors", "model-2.safetensors"])
def test_every_file_of_the_model_counts(folder: Path, name: str) -> None:
    before = of(folder)
    assert before == of(folder)
    (folder / name).write_bytes(b"!" * len(name))
    changed = of(folder)
    (folder / name).unlink()
    assert len({before, changed, of(folder), of(folder / "nowhere")}) == 4


def test_content_counts_and_nothing_else_does(folder: Path) -> None:
    before = of(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes())
    (folder / "predictor.safetensors").write_bytes(b"another")
    assert of(folder) == before
    assert fingerprint(MODEL, str(folder), 1) == before
    moved = folder.rename(folder.with_name("moved"))
    assert of(moved) == before


def test_scale_weights_are_those_in_the_models_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SCALE_MODELS", folder.parent)
    assert fingerprint(MODEL, "scale", 0) == of(folder)


def test_a_large_file_is_told_by_its_change_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = of(folder)
    monkeypatch.setattr(weights, "LARGE", 0)
    weights._digest.cache_clear()
    large = of(folder)
    (folder / "config.json").touch()
    assert len({small, large, of(folder)}) == 3


def test_dummies_are_their_seed() -> None:
    assert fingerprint(MODEL, "dummy", 0) == fingerprint(MODEL, "dummy", 0)
    assert fingerprint(MODEL, "dummy", 0) != fingerprint(MODEL, "dummy", 1)


def test_hub_weights_are_the_revision_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--someone--toy" / "refs" / "main"
    found = {fingerprint(MODEL, "hub", 0), fingerprint({**MODEL, "hub_id": "other/toy"}, "hub", 0)}
    reference.parent.mkdir(parents=True)
    for revision in ("abc", "def"):
        reference.write_text(revision)
        found.add(fingerprint(MODEL, "hub", 0))
    assert len(found) == 4


def test_it_takes_no_torch() -> None:
    code = "import sys, experiments.run.weights; sys.exit('torch' in sys.modules)"
    assert python("-c", code).returncode == 0
