"""Train and export a scale model: ``python -m experiments.train.scale_models model=mixtral``.

On a CPU with glibc a step takes a sixth less time if large tensors stay mapped:
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184.
"""

import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import jinja2
import matplotlib
import pandas as pd
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from rich.console import Console as RichConsole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from experiments.errors import command
from experiments.run.console import bar_on
from experiments.run.datasets import Document, documents
from experiments.run.weights import loading
from finemoe.files import atomic_write, write_json

END_OF_TEXT = "<|endoftext|>"
CARD = Path(__file__).with_name("card.md")

RECIPE = [  # what a training run is made of, apart from model and text
    "tokens", "sequence_length", "batch_sequences", "learning_rate", "warmup_steps", "weight_decay",
    "evaluate_every", "evaluate_sequences", "seed",
]  # fmt: skip


@dataclass
class Training:
    """One model, its optimizer, and the checkpoint they are kept in.

    A step's batch depends on seed and step alone: a resumed run ends as one that ran through.
    `history` holds `step`, and `train_loss` and `held_out_loss` in nats per token.
    """

    model: PreTrainedModel
    recipe: DictConfig  # the settings that RECIPE names
    train_ids: torch.Tensor
    held_out_ids: torch.Tensor
    checkpoint: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        embedding, decay = self.model.get_input_embeddings().weight, self.recipe.weight_decay
        groups: list[Any] = [{"params": [], "weight_decay": one} for one in (decay, 0.0)]
        for one in self.model.parameters():
            groups[one.dim() <= 1 or one is embedding]["params"].append(one)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        if self.checkpoint.exists():
            self._restore()

    @property
    def steps(self) -> int:
        recipe = self.recipe
        return math.ceil(recipe.tokens / (recipe.sequence_length * recipe.batch_sequences))

    def run(self, stop_after: int | None = None) -> Iterator[dict[str, Any]]:
        """Train to the end of the recipe, or to step `stop_after`; yield every evaluation."""
        last = min(self.steps, stop_after or self.steps)
        losses: list[float] = []
        while self.step < last:
            losses.append(self._train_step())
            self.step += 1
            if self.step % self.recipe.evaluate_every == 0 or self.step == last:
                held_out = self.held_out_loss(self.recipe.evaluate_sequences)
                means = {"train_loss": sum(losses) / len(losses), "held_out_loss": held_out}
                losses.clear()
                self.history.append({"step": self.step, **means})
                state = {
                    "recipe": OmegaConf.to_container(self.recipe),
                    "step": self.step,
                    "history": self.history,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
                with atomic_write(self.checkpoint) as partial:
                    torch.save(state, partial)
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
        # Linear warm-up, then a cosine to a tenth of the peak.
        warmup = self.recipe.warmup_steps
        done = (self.step - warmup) / max(1, self.steps - warmup)
        share = (self.step + 1) / warmup if done < 0 else 0.55 + 0.45 * math.cos(math.pi * done)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.recipe.learning_rate * share)
        seed = self.recipe.seed * 1_000_003 + self.step
        # PhiMoE's router samples while it trains.
        torch.manual_seed(seed)
        length, rows = self.recipe.sequence_length, self.recipe.batch_sequences
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.train_ids) - length, (rows,), generator=generator)
        batch = self.train_ids.unfold(0, length, 1)[starts]
        output = self.model(
            input_ids=batch, labels=batch, use_cache=False, output_router_logits=True
        )
        # The model's own loss pools the layers, so a single layer could still starve an expert.
        config, balance = self.model.config, sys.modules[type(self.model).__module__]
        layers = [
            balance.load_balancing_loss_func((one,), one.shape[-1], config.num_experts_per_tok)
            for one in output.router_logits
        ]
        loss = output.loss + config.router_aux_loss_coef * torch.stack(layers).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        own_balance_loss = output.aux_loss * config.router_aux_loss_coef
        return float((output.loss - own_balance_loss).detach())

    def _restore(self) -> None:
        with loading(f"checkpoint {self.checkpoint}", "remove it to start over"):
            state = torch.load(self.checkpoint, weights_only=True)
            if state["recipe"] != OmegaConf.to_container(self.recipe):
                raise ValueError("it is of another recipe")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]


def held_out_windows(ids: torch.Tensor, length: int, windows: int | None) -> torch.Tensor:
    """Return evenly spaced windows of `length` tokens, or all that there are."""
    whole = len(ids) // length
    count = whole if windows is None else min(windows, whole)
    return ids.unfold(0, length, length)[torch.linspace(0, whole - 1, count).long()]


@torch.no_grad()
def least_used_share(model: PreTrainedModel, windows: torch.Tensor, batch: int) -> float:
    """Return the use of the least used expert of any layer, relative to its fair share."""
    model.eval()
    shares: Any = 0.0
    for part in windows.split(batch):
        output = model(input_ids=part, use_cache=False, output_router_logits=True)
        logits = torch.stack([one.reshape(-1, one.shape[-1]) for one in output.router_logits])
        chosen = logits.topk(model.config.num_experts_per_tok).indices
        shares += torch.zeros_like(logits, dtype=torch.float32).scatter(-1, chosen, 1.0).sum(1)
    return float((shares / shares.mean(dim=1, keepdim=True)).min())


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `vocabulary` tokens trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special: Any = dict.fromkeys(("eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def encode(tokenizer: PreTrainedTokenizerFast, chosen: list[Document]) -> torch.Tensor:
    """Return the documents as one row of token ids, each ended by the end-of-text token."""
    texts = tokenizer([document.text for document in chosen])["input_ids"]
    return torch.tensor([token for text in texts for token in (*text, tokenizer.eos_token_id)])


def build_model(cfg: DictConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return the untrained scale model, in fp32, initialised by the seed."""
    settings: Any = OmegaConf.to_container(cfg.model.scale.config, resolve=True)
    config = transformers.AutoConfig.for_model(
        **settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # A padding token would keep a zero embedding, through which gradients overflow.
        pad_token_id=None,
    )
    torch.manual_seed(cfg.seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation(cfg.model.scale.experts_implementation)
    if cfg.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model.train()


def draw_loss(training: Training, baseline: float, path: Path) -> None:
    """Draw the loss curve of the run against the unigram baseline."""
    matplotlib.use("Agg")
    history = pd.DataFrame(training.history)
    history["tokens"] = history["step"] * training.recipe.tokens / training.steps / 1e6
    named = {"train_loss": "training", "held_out_loss": "held out"}
    curves = history.set_index("tokens")[list(named)].rename(columns=named)
    labels: Any = {"xlabel": "training tokens (millions)", "ylabel": "loss (nats per token)"}
    axes: Any = curves.plot(figsize=(4.5, 3), grid=True, **labels)
    axes.axhline(baseline, color="0.4", linestyle="--", label="unigram, held out")
    axes.legend()
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


def export(cfg: DictConfig, training: Training, tokenizer: Any, baseline: float) -> dict[str, Any]:
    """Write weights (bf16), tokenizer, history, loss curve and card; return what the card says."""
    folder = Path(cfg.export)
    loss = training.held_out_loss()
    model: Any = training.model
    model.to(torch.bfloat16)
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(do_sample=False, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    windows = held_out_windows(training.held_out_ids, training.recipe.sequence_length, None)
    summary = {
        "least_used_share": least_used_share(model, windows, training.recipe.batch_sequences),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "unigram_perplexity": math.exp(baseline),
        "tokens": training.recipe.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": OmegaConf.to_container(training.recipe),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "history": training.history,
    }
    write_json(folder / "training.json", summary)
    draw_loss(training, baseline, folder / "loss.png")
    card = jinja2.Template(CARD.read_text(), keep_trailing_newline=True)
    facts = {"model": cfg.model, "checkpoints": cfg.checkpoints}
    (folder / "README.md").write_text(card.render(facts | summary))
    return summary


def train(cfg: DictConfig, corpus: Sequence[Document]) -> None:
    """Train on a corpus, resuming from a checkpoint if there is one, and export when done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learned = [one for one in corpus if not one.held_out]
    held_out = [one for one in corpus if one.held_out]
    tokenizer = train_tokenizer([one.text for one in learned], cfg.vocabulary)
    train_ids, held_out_ids = (encode(tokenizer, part).to(device) for part in (learned, held_out))
    # The loss of add-one-smoothed unigram frequencies.
    counts = torch.bincount(train_ids.cpu(), minlength=len(tokenizer)).double() + 1
    baseline = float(-(counts / counts.sum()).log()[held_out_ids.cpu()].mean())
    model: Any = build_model(cfg, tokenizer)
    checkpoint = Path(cfg.checkpoints) / "last.pt"
    recipe = OmegaConf.masked_copy(cfg, [*RECIPE])
    training = Training(model.to(device), recipe, train_ids, held_out_ids, checkpoint)
    print(f"{cfg.model.name}: {len(train_ids):,} tokens, {training.steps} steps on {device}")
    with bar_on(RichConsole()) as bar:
        task = bar.add_task("training", total=training.steps, completed=training.step)
        for at in training.run(cfg.stop_after):
            bar.update(task, completed=at["step"])
            losses = f"train {at['train_loss']:.3f}, held out {at['held_out_loss']:.3f} nats"
            bar.console.print(f"step {at['step']}: {losses}")
    if training.step < training.steps:
        print(f"stopped at step {training.step}; call again to go on")
        return
    summary = export(cfg, training, tokenizer, baseline)
    print(
        f"held-out perplexity {summary['held_out_perplexity']:.1f}, "
        f"unigram {summary['unigram_perplexity']:.1f}, least used expert "
        f"{summary['least_used_share']:.2f} of its fair share; exported to {cfg.export}"
    )


@hydra.main(config_path="../../conf", config_name="scale_models", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Train as the config says on the standard library's text; exit 2 for bad input."""
    train(cfg, documents())


if __name__ == "__main__":
    main()
