"""Train ProMoE's learned predictor: ``python -m experiments.train.predictor model=mixtral``.

For each layer l < L - d a two-layer perceptron predicts from layer l's input what layer l + d
activates. It learns from documents that no run draws its prompts from.
"""

import json
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from baselines.promoe import LearnedPredictor
from baselines.resident import ResidentPolicy
from experiments.errors import UserError, command
from experiments.run.config import identity
from experiments.run.datasets import Dataset, corpus_dataset, corpus_texts, draw_prompts
from experiments.run.live import serve
from experiments.run.models import LoadedModel, load_model
from experiments.run.schedule import Request
from finemoe.assemble import resident_runtime
from finemoe.offload.policy import FloatArray, Gate, Iteration, ModelShape, Placement
from finemoe.selection import top_experts


class Recording(NamedTuple):
    """What N tokens brought to every gate, and what it chose for them."""

    hidden_states: FloatArray  # shape (L, N, h)
    chosen: NDArray[np.bool_]  # whether a token goes to an expert, shape (L, N, J)


class Recorder(ResidentPolicy):
    """Keeps what every gate saw and decided, by layer."""

    placement = Placement("critical_path", hidden_states=True, everything_resident=True)

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.gates: list[list[Gate]] = [[] for _ in range(shape.layers)]

    def on_gate(self, iteration: Iteration, gate: Gate) -> None:
        self.gates[gate.layer].append(gate)


def record(cfg: DictConfig, model: LoadedModel, dataset: Dataset, count: int) -> Recording:
    """Serve prompts with everything resident; return what their gates saw and chose."""
    drawn = draw_prompts(dataset, model.tokenizer, count, cfg.input_tokens, cfg.seed)
    requests = [Request(n, prompt, cfg.output_tokens) for n, prompt in enumerate(drawn)]
    shape = model.offloaded.shape
    recorder = Recorder(shape)
    with resident_runtime(model.offloaded, recorder) as runtime:
        serve(runtime, requests, cfg.batch_size)
    hidden, scores = (
        np.stack([np.concatenate([getattr(gate, name) for gate in of]) for of in recorder.gates])
        for name in ("hidden_states", "probabilities")
    )
    return Recording(hidden, top_experts(scores, shape.top_k))


def train(recording: Recording, distance: int, cfg: DictConfig) -> LearnedPredictor:
    """Return perceptrons of `cfg` that minimise binary cross-entropy over layer l + d's experts."""
    inputs = torch.from_numpy(recording.hidden_states[:-distance])
    targets = torch.from_numpy(recording.chosen[distance:]).float()
    (sources, tokens, width), experts, units = inputs.shape, targets.shape[2], cfg.hidden_units
    generator = torch.Generator().manual_seed(cfg.seed)

    def weights(outputs: int, fan_in: int) -> Tensor:
        drawn = torch.randn(sources, outputs, fan_in, generator=generator)
        return (drawn * fan_in**-0.5).requires_grad_()

    up, down = weights(units, width), weights(experts, units)
    up_bias = torch.zeros(sources, units, requires_grad=True)
    down_bias = torch.zeros(sources, experts, requires_grad=True)
    optimizer = torch.optim.Adam([up, up_bias, down, down_bias], lr=cfg.learning_rate)
    for _ in range(cfg.epochs):
        for rows in torch.randperm(tokens, generator=generator).split(cfg.tokens_per_step):
            hidden = torch.relu(inputs[:, rows] @ up.mT + up_bias[:, None])
            logits = hidden @ down.mT + down_bias[:, None]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[:, rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return LearnedPredictor(*(one.detach().numpy() for one in (up, up_bias, down, down_bias)))


def top_k_accuracy(
    predictor: LearnedPredictor, recording: Recording, distance: int, top_k: int
) -> list[float]:
    """Return, for each source layer, the share of activated experts among the K predicted."""
    scores = predictor.logits(slice(None), recording.hidden_states[:-distance])
    activated = recording.chosen[distance:]
    hits = (top_experts(scores, top_k) & activated).sum(axis=(1, 2))
    accuracies: list[float] = (hits / activated.sum(axis=(1, 2))).tolist()
    return accuracies


@hydra.main(config_path="../../conf", config_name="train_predictor", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Record, train, measure and save as the config says; exit 2 for bad input."""
    for name in ("prompts", "held_out_prompts", "output_tokens", "batch_size", "hidden_units"):
        if cfg[name] < 1:
            raise UserError(f"{name}={cfg[name]}: it starts at 1")
    if not 1 <= cfg.distance < cfg.model.layers:
        raise UserError(f"distance={cfg.distance}: give 1 to {cfg.model.layers - 1}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(cfg.model, str(cfg.weights), device, cfg.seed)
    # No run draws its prompts from documents that are not held out.
    learning = corpus_texts(cfg.kind, held_out=False)
    others = Dataset(cfg.kind, "documents that are not held out", learning)
    learned_from = record(cfg, model, others, cfg.prompts)
    tested_on = record(cfg, model, corpus_dataset("held out", cfg.kind), cfg.held_out_prompts)
    predictor = train(learned_from, cfg.distance, cfg)
    shape = model.offloaded.shape
    accuracies = top_k_accuracy(predictor, tested_on, cfg.distance, shape.top_k)
    accuracy = float(np.mean(accuracies))
    facts = {
        "model": identity(cfg),
        "held_out_top_k_accuracy": f"{accuracy:.4f}",
        "held_out_top_k_accuracy_by_layer": json.dumps([round(one, 4) for one in accuracies]),
        "trained_tokens": str(learned_from.hidden_states.shape[1]),
        "held_out_tokens": str(tested_on.hidden_states.shape[1]),
    }
    predictor.save(Path(cfg.path), cfg.distance, facts)
    print(
        f"{identity(cfg)}, d={cfg.distance}: {accuracy:.1%} of activated experts predicted on "
        f"held-out prompts (chance {shape.top_k / shape.experts:.1%}); saved to {cfg.path}"
    )


if __name__ == "__main__":
    main()
