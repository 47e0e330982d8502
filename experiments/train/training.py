"""Train one small MoE language model, resumable at every checkpoint.

A step's batch depends only on the seed and the step number, so a run that was stopped and resumed
ends with the weights of one that ran through.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PreTrainedModel

from finemoe.files import atomic_write


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of, apart from model and text."""

    tokens: int
    sequence_length: int
    batch_sequences: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    evaluate_every: int
    evaluate_sequences: int
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.sequence_length * self.batch_sequences))

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass
class Training:
    """One model, its optimizer, and the checkpoint they are kept in.

    `history` holds `step`, `train_loss` and `held_out_loss`, in nats per token, of each evaluation.
    """

    model: PreTrainedModel
    recipe: Recipe
    train_ids: torch.Tensor
    held_out_ids: torch.Tensor
    checkpoint: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        embedding = self.model.get_input_embeddings().weight
        decayed = [p for p in self.model.parameters() if p.dim() > 1 and p is not embedding]
        others = [p for p in self.model.parameters() if p.dim() <= 1 or p is embedding]
        groups = [
            {"params": decayed, "weight_decay": self.recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        rate = self.recipe.learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
        if self.checkpoint.exists():
            self._restore()

    def run(self, stop_after: int | None = None) -> Iterator[dict[str, Any]]:
        """Train to the end of the recipe, or to step `stop_after`; yield every evaluation."""
        last = min(self.recipe.steps, stop_after or self.recipe.steps)
        losses: list[float] = []
        while self.step < last:
            losses.append(self._train_step())
            self.step += 1
            if self.step % self.recipe.evaluate_every == 0 or self.step == last:
                held_out = self.held_out_loss(self.recipe.evaluate_sequences)
                means = {"train_loss": sum(losses) / len(losses), "held_out_loss": held_out}
                losses.clear()
                self.history.append({"step": self.step, **means})
                self._save()
                yield self.history[-1]

    @torch.no_grad()
    def held_out_loss(self, sequences: int | None = None) -> float:
        """Cross entropy in nats per token over evenly spaced held-out windows, or over all."""
        windows = held_out_windows(self.held_out_ids, self.recipe.sequence_length, sequences)
        self.model.eval()
        losses = [
            self.model(input_ids=batch, labels=batch, use_cache=False).loss
            for batch in windows.split(self.recipe.batch_sequences)
        ]
        self.model.train()
        return float(torch.stack(losses).mean())

    def _train_step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        # PhiMoE's router samples while it trains.
        torch.manual_seed(self._step_seed)
        batch = self._batch()
        output = self.model(
            input_ids=batch, labels=batch, use_cache=False, output_router_logits=True
        )
        # The model's own loss pools the layers, so a single layer could still starve an expert.
        loss = output.loss + self._balance_loss(output.router_logits)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float((output.loss - output.aux_loss * self._balance_weight).detach())

    @property
    def _step_seed(self) -> int:
        return self.recipe.seed * 1_000_003 + self.step

    @property
    def _balance_weight(self) -> float:
        return float(self.model.config.router_aux_loss_coef)

    def _balance_loss(self, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the family's own auxiliary load-balancing loss, layer by layer."""
        family = sys.modules[type(self.model).__module__]
        losses = [
            family.load_balancing_loss_func(
                (logits,), logits.shape[-1], self.model.config.num_experts_per_tok
            )
            for logits in router_logits
        ]
        return self._balance_weight * torch.stack(losses).mean()

    def _batch(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._step_seed)
        length, rows = self.recipe.sequence_length, self.recipe.batch_sequences
        starts = torch.randint(len(self.train_ids) - length, (rows,), generator=generator)
        positions = starts[:, None] + torch.arange(length)
        return self.train_ids[positions.to(self.train_ids.device)]

    def _save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(self.checkpoint) as partial:
            torch.save(state, partial)

    def _restore(self) -> None:
        try:
            state = torch.load(self.checkpoint, weights_only=True)
            known = state["recipe"]
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, UnpicklingError) as error:
            raise ValueError(f"{self.checkpoint} is no checkpoint; remove it") from error
        if known != asdict(self.recipe):
            raise ValueError(
                f"{self.checkpoint} belongs to another recipe; remove it to train from the start"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = state["history"]


def held_out_windows(ids: torch.Tensor, length: int, windows: int | None) -> torch.Tensor:
    """Return evenly spaced windows of `length` tokens, or all that there are."""
    whole = len(ids) // length
    cut = ids[: whole * length].view(whole, length)
    if windows is None or windows >= whole:
        return cut
    return cut[torch.linspace(0, whole - 1, windows).long()]


@torch.no_grad()
def least_used_share(model: PreTrainedModel, windows: torch.Tensor, batch: int) -> float:
    """Return the use of the least used expert of any layer, relative to its fair share."""
    top_k = model.config.num_experts_per_tok
    counts: list[torch.Tensor] = []
    model.eval()
    for part in windows.split(batch):
        output = model(input_ids=part, use_cache=False, output_router_logits=True)
        logits = torch.stack([one.reshape(-1, one.shape[-1]) for one in output.router_logits])
        used = torch.zeros(logits.shape, device=logits.device)
        counts.append(used.scatter(-1, logits.topk(top_k).indices, 1.0).sum(1))
    shares = torch.stack(counts).sum(0)
    return float((shares / shares.mean(dim=1, keepdim=True)).min())
