"""The shipped scale model, and the command that trains one, at toy size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.errors import UserError
from experiments.run.datasets import Document
from experiments.run.models import small_model
from experiments.train.scale_models import Training, train
from tests.command import ROOT, config

TOY = (
    *("tokens=256", "sequence_length=32", "batch_sequences=1", "evaluate_every=4"),
    *("evaluate_sequences=2", "warmup_steps=2", "vocabulary=300"),
    "model.scale.config.num_hidden_layers=2",
)
README = (ROOT / "README.md").read_text().split("\n\n")
CORPUS = [Document(f"part {number}", "docs", (text,)) for number, text in enumerate(README)]


def test_training_resumes_and_exports(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    overrides = (*TOY, f"checkpoints={tmp_path}", f"export={folder}")
    train(config("scale_models", *overrides, "stop_after=4"), CORPUS)
    assert not folder.exists()
    train(config("scale_models", *overrides), CORPUS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size == 300
    assert (folder / "loss.png").stat().st_size > 0
    assert "loss.png" in (folder / "README.md").read_text()
    training = json.loads((folder / "training.json").read_text())
    assert [progress["step"] for progress in training["history"]] == [4, 8]
    assert 0 <= training["least_used_share"] < 1


RECIPE = (
    *("tokens=192", "sequence_length=16", "batch_sequences=2", "warmup_steps=2"),
    *("evaluate_every=2", "evaluate_sequences=2"),
)


def training(checkpoint: Path) -> Training:
    ids = torch.randint(128, (500,), generator=torch.Generator().manual_seed(0))
    model = small_model("mixtral", torch.float32)
    return Training(model.train(), config("scale_models", *RECIPE), ids, ids[:64], checkpoint)


def test_stopped_and_resumed_equals_run_through(tmp_path: Path) -> None:
    through = training(tmp_path / "through.pt")
    history = list(through.run())
    stopped = training(tmp_path / "stopped.pt")
    assert [progress["step"] for progress in stopped.run(stop_after=4)] == [2, 4]
    resumed = training(tmp_path / "stopped.pt")
    assert resumed.step == 4
    list(resumed.run())
    assert resumed.history == history
    ours, theirs = through.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Harmful:
    """Runs code when it is unpickled by whom nothing keeps from it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.place,)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save(Harmful(tmp_path / "was here"), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"cannot load checkpoint .*; remove it"):
        training(tmp_path / "a.pt")
    assert not (tmp_path / "was here").exists()
