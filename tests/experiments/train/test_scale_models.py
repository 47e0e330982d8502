"""The shipped scale model, and the command that trains one, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.run.weights import SCALE_MODELS
from tests.command import run_module

TOY = (
    "tokens=1024",
    "sequence_length=128",
    "batch_sequences=1",
    "evaluate_every=4",
    "evaluate_sequences=2",
    "warmup_steps=2",
    "vocabulary=300",
    "model.scale.config.num_hidden_layers=2",
)


def train(folder: Path, *arguments: str) -> str:
    places = (f"checkpoints={folder / 'checkpoints'}", f"export={folder / 'model'}")
    done = run_module("experiments.train.scale_models", *TOY, *places, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_stops_resumes_and_exports(tmp_path: Path) -> None:
    assert "stopped at step 4" in train(tmp_path, "stop_after=4")
    assert not (tmp_path / "model").exists()
    assert "held-out perplexity" in train(tmp_path)
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size == 300
    assert (folder / "loss.png").stat().st_size > 0
    assert "loss.png" in (folder / "README.md").read_text()
    history = json.loads((folder / "training.json").read_text())["history"]
    assert [progress["step"] for progress in history] == [4, 8]


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
