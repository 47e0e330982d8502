"""Train and export a scale model: ``python -m experiments.train.scale_models model=mixtral``.

Trains a small member of the paper model's family, with the same routing shape (L, J, K), on the
text of `experiments.run.corpus`, and exports it in the Hugging Face format. A second call resumes.

On a CPU with glibc a step takes a sixth less time if large tensors stay mapped:
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import matplotlib
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console as RichConsole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from experiments.errors import command
from experiments.run.console import bar_on
from experiments.run.corpus import Document, documents
from experiments.train.training import Recipe, Training, held_out_windows, least_used_share

END_OF_TEXT = "<|endoftext|>"


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, chosen: list[Document]) -> torch.Tensor:
    """Return the documents as one row of token ids, each ended by the end-of-text token."""
    texts = tokenizer([document.text for document in chosen])["input_ids"]
    return torch.tensor([token for text in texts for token in (*text, tokenizer.eos_token_id)])


def unigram_loss(train_ids: torch.Tensor, held_out_ids: torch.Tensor, vocabulary: int) -> float:
    """Return the held-out loss, in nats per token, of add-one-smoothed unigram frequencies."""
    counts = torch.bincount(train_ids.cpu(), minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held_out_ids.cpu()].mean())


def build_model(cfg: DictConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return the untrained scale model, in fp32, initialised by the seed."""
    settings: Any = OmegaConf.to_container(cfg.model.scale.config, resolve=True)
    config = AutoConfig.for_model(
        **settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # A padding token would keep a zero embedding, through which gradients overflow.
        pad_token_id=None,
    )
    torch.manual_seed(cfg.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation(cfg.model.scale.experts_implementation)
    if cfg.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model.train()


def draw_loss(training: Training, baseline: float, path: Path) -> None:
    """Draw the loss curve of the run against the unigram baseline."""
    matplotlib.use("Agg")
    history = pd.DataFrame(training.history)
    history["tokens"] = history["step"] * training.recipe.tokens / training.recipe.steps / 1e6
    named = {"train_loss": "training", "held_out_loss": "held out"}
    curves = history.set_index("tokens")[list(named)].rename(columns=named)
    axes: Any = curves.plot(figsize=(4.5, 3), grid=True)
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)")
    axes.axhline(baseline, color="0.4", linestyle="--", label="unigram, held out")
    axes.legend()
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


def export(cfg: DictConfig, training: Training, tokenizer: Any, baseline: float) -> dict[str, Any]:
    """Write weights (bf16), tokenizer, generation config, history, loss curve and card.

    Returns what the card says, among it the perplexity over the whole held-out text.
    """
    folder = Path(cfg.export)
    folder.mkdir(parents=True, exist_ok=True)
    loss = training.held_out_loss()
    model: Any = training.model
    model.to(torch.bfloat16)
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, **special)
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
        "recipe": asdict(training.recipe),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "history": training.history,
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_loss(training, baseline, folder / "loss.png")
    (folder / "README.md").write_text(card(cfg, summary))
    return summary


def card(cfg: DictConfig, summary: dict[str, Any]) -> str:
    """Return the model card: what it is, what it learned from, how to train it again."""
    name, shape = cfg.model.name, cfg.model.scale.config
    return f"""# {name}, scale model

A small `{shape.model_type}` with the routing shape of the paper's model: {cfg.model.layers} layers,
{cfg.model.experts} experts a layer, top-{cfg.model.top_k}; hidden size {shape.hidden_size},
{summary["parameters"] / 1e6:.1f} M parameters, stored in bfloat16. Its routing is that of its
trained gates; the only pressure on them is the family's own auxiliary load-balancing loss.

| | |
|---|---|
| corpus | Python {summary["python"]} standard library: docstrings, language reference, source |
| held out | one document in ten, by a hash of its name (`experiments/run/corpus.py`) |
| training tokens | {summary["tokens"]:,} |
| held-out perplexity | {summary["held_out_perplexity"]:.1f} |
| unigram perplexity, same text | {summary["unigram_perplexity"]:.1f} |
| least used expert, held-out text | {summary["least_used_share"]:.2f} of its fair share |

![loss](loss.png)

The curve's held-out loss is over {summary["recipe"]["evaluate_sequences"]} windows spread over the
held-out text; the perplexity above is over all of it.

Train it again: `python -m experiments.train.scale_models model={name} tokens={summary["tokens"]}`
(resumes where it was stopped; remove `{cfg.checkpoints}` to start over).
"""


def train(cfg: DictConfig, corpus: Sequence[Document]) -> None:
    """Train on a corpus, resuming from a checkpoint if there is one, and export when done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learned = [one for one in corpus if not one.held_out]
    held_out = [one for one in corpus if one.held_out]
    tokenizer = train_tokenizer([one.text for one in learned], cfg.vocabulary)
    train_ids, held_out_ids = (encode(tokenizer, part).to(device) for part in (learned, held_out))
    baseline = unigram_loss(train_ids, held_out_ids, len(tokenizer))
    recipe = Recipe(**{name: cfg[name] for name in Recipe.__dataclass_fields__})
    model: Any = build_model(cfg, tokenizer)
    checkpoint = Path(cfg.checkpoints) / "last.pt"
    training = Training(model.to(device), recipe, train_ids, held_out_ids, checkpoint)
    print(f"{cfg.model.name}: {len(train_ids):,} tokens of text, {recipe.steps} steps on {device}")
    with bar_on(RichConsole()) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=training.step)
        for at in training.run(cfg.stop_after):
            bar.update(task, completed=at["step"])
            losses = f"train {at['train_loss']:.3f}, held out {at['held_out_loss']:.3f} nats"
            bar.console.print(f"step {at['step']}: {losses}")
    if training.step < recipe.steps:
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
