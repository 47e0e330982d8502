"""Prompts: the paper's two datasets through `datasets`, and two built-in ones from the corpus."""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.corpus import Kind, documents
from experiments.errors import UserError
from experiments.weights import hub_access, loading

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SENTINEL = 'A prompt, <b>as LONG & odd</b> as "real" ones:\n\n  {{ it }}' * 50 + "!"


@dataclass(frozen=True)
class Dataset:
    """Texts from which prompts are drawn, and where they come from."""

    name: str
    source: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """Prompts as token ids, all of one length, with the hash of what was drawn."""

    dataset: str
    source: str
    prompts: tuple[tuple[int, ...], ...]
    sha256: str


def corpus_dataset(name: str, kind: Kind) -> Dataset:
    """Return held-out passages of the running Python's standard library, never trained on."""
    texts = [
        passage.strip()
        for document in documents()
        if document.kind == kind and document.held_out
        for passage in document.passages
    ]
    source = f"Python {platform.python_version()} standard library, held-out documents"
    return Dataset(name, source, tuple(dict.fromkeys(texts)))


def conversations(name: str, path: str, split: str, data_files: str | None = None) -> Dataset:
    """Return the first human turn of each conversation of a hub dataset or a local file.

    Reads LMSYS-Chat-1M's schema (`conversation`: role, content) and ShareGPT's (`conversations`:
    from, value). Raises UserError if the data is missing, gated, or in neither schema.
    """
    rows = _local_rows(Path(path)) if Path(path).suffix in READERS else None
    if rows is None:
        rows = _hub_rows(path, split, data_files)
    texts = tuple(dict.fromkeys(text for row in rows if (text := _first_turn(row, path))))
    if not texts:
        raise UserError(f"{path} holds no usable prompt: every first human turn is empty")
    return Dataset(name, path, texts)


def draw_prompts(
    dataset: Dataset, tokenizer: Any, count: int, input_tokens: int, seed: int
) -> PromptSet:
    """Draw `count` prompts by seed, each cut to exactly `input_tokens` tokens.

    The tokenizer's chat template, where it has one, is counted in. Raises UserError if too few
    texts are that long.
    """
    if min(input_tokens, count) < 1:
        raise UserError("workload.prompts and workload.input_tokens start at 1")
    before, after = template(tokenizer)
    room = input_tokens - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"input_tokens={input_tokens} leaves no room beside the chat template's "
            f"{len(before) + len(after)} tokens; raise it"
        )
    texts = list(dataset.texts)
    random.Random(seed).shuffle(texts)
    prompts: list[tuple[int, ...]] = []
    for text in texts:
        if len(prompts) == count:
            break
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= room:
            prompts.append((*before, *ids[:room], *after))
    if len(prompts) < count:
        raise UserError(
            f"only {len(prompts)} of the {len(texts)} texts of {dataset.name} have the "
            f"{input_tokens} input tokens asked for, {count} are needed; lower "
            "workload.input_tokens or workload.prompts"
        )
    digest = hashlib.sha256(repr(prompts).encode()).hexdigest()
    return PromptSet(dataset.name, dataset.source, tuple(prompts), digest)


def template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids that the chat template, or the tokenizer, puts around a prompt.

    Raises UserError if the template fails or does not pass a prompt on as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        bos = tokenizer.bos_token_id
        return ([] if bos is None else [bos]), []
    turn = [{"role": "user", "content": SENTINEL}]
    remedy = "remove or replace its chat template"
    with loading("the tokenizer's chat template", remedy):
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    around = text.split(SENTINEL)
    if len(around) != 2:
        raise UserError(f"the tokenizer's chat template alters, drops or repeats text; {remedy}")
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in around]
    return ids[0], ids[1]


def _local_rows(path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    if not path.exists():
        raise UserError(f"there is no file {path}; give dataset.path a json, jsonl or parquet file")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; give dataset.path a file with conversations")
    reader = READERS[path.suffix]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield from datasets.load_dataset(
            reader, data_files=str(path), split="train", streaming=True
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot read {path} as {reader}: {_first_line(error)}; mend or replace the file"
        ) from error


def _hub_rows(path: str, split: str, data_files: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    with hub_access(), loading(f"the dataset {path}", "dataset=docs is always there"):
        rows = datasets.load_dataset(path, data_files=data_files, split=split)
    yield from rows


def _first_turn(row: dict[str, Any], path: str) -> str | None:
    for turns, speaker, human, content in (
        ("conversation", "role", "user", "content"),
        ("conversations", "from", "human", "value"),
    ):
        said = row.get(turns)
        if isinstance(said, list) and all(isinstance(turn, dict) for turn in said):
            texts = [turn.get(content) for turn in said if turn.get(speaker) == human]
            return texts[0].strip() if texts and isinstance(texts[0], str) else None
    raise UserError(
        f"{path} has the columns {', '.join(row)}: neither LMSYS's `conversation` (role, content) "
        "nor ShareGPT's `conversations` (from, value)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
