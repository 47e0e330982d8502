"""The shipped scale model, and the command that trains one, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.run.corpus import Document
from experiments.run.weights import SCALE_MODELS
from experiments.train.scale_models import train
from tests.command import ROOT, config

TOY = (
    "tokens=256",
    "sequence_length=32",
    "batch_sequences=1",
    "evaluate_every=4",
    "evaluate_sequences=2",
    "warmup_steps=2",
    "vocabulary=300",
    "model.scale.config.num_hidden_layers=2",
)
README = (ROOT / "README.md").read_text().split("\n\n")
CORPUS = [Document(f"part {number}", "docs", (text,)) for number, text in enumerate(README)]


def test_training_stops_resumes_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    overrides = (*TOY, f"checkpoints={tmp_path}", f"export={folder}")
    train(config("scale_models", *overrides, "stop_after=4"), CORPUS)
    assert "stopped at step 4" in capsys.readouterr().out
    assert not folder.exists()
    train(config("scale_models", *overrides), CORPUS)
    assert "held-out perplexity" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size == 300
    assert (folder / "loss.png").stat().st_size > 0
    assert "loss.png" in (folder / "README.md").read_text()
    training = json.loads((folder / "training.json").read_text())
    assert [progress["step"] for progress in training["history"]] == [4, 8]
    assert 0 <= training["least_used_share"] < 1


@pytest.mark.parametrize(
    ("name", "shape"), [("mixtral", (32, 8, 2)), ("qwen", (24, 60, 4)), ("phi", (32, 16, 2))]
)
def test_the_shipped_model_has_the_paper_models_routing_shape(
    name: str, shape: tuple[int, int, int]
) -> None:
    config = AutoModelForCausalLM.from_pretrained(SCALE_MODELS / name).config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    assert (config.num_hidden_layers, experts, config.num_experts_per_tok) == shape
    training = json.loads((SCALE_MODELS / name / "training.json").read_text())
    assert training["held_out_perplexity"] < training["unigram_perplexity"] / 5
    # No expert of any layer below a fifth of its fair share on held-out text.
    assert training["least_used_share"] > 0.2
    size = sum(path.stat().st_size for path in SCALE_MODELS.rglob("*") if path.is_file())
    assert size < 60e6
