"""Prompts: schemas, exact lengths, templates, determinism, nothing from the training text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from experiments.corpus import documents
from experiments.datasets import Dataset, conversations, corpus_dataset, draw_prompts
from experiments.weights import SCALE_MODELS

TEXTS = ("What is the capital of France, and how many live there?", "Tell me about whales.")
LMSYS = [{"conversation": [{"role": "user", "content": text}]} for text in TEXTS]
SHAREGPT = [
    {"conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": text}]}
    for text in TEXTS
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")


@pytest.mark.parametrize("rows", [LMSYS, SHAREGPT], ids=["lmsys", "sharegpt"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_both_schemas_are_read_from_every_format(
    rows: list[dict[str, Any]], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert conversations("test", str(path), "train").texts == TEXTS


def test_prompts_have_exactly_the_tokens_asked_for_and_depend_on_the_seed(tokenizer: Any) -> None:
    dataset = corpus_dataset("docs", "docs")
    first = draw_prompts(dataset, tokenizer, 20, 37, seed=0)
    assert {len(prompt) for prompt in first.prompts} == {37}
    assert first == draw_prompts(dataset, tokenizer, 20, 37, seed=0)
    assert first.sha256 != draw_prompts(dataset, tokenizer, 20, 37, seed=1).sha256


def test_a_chat_template_is_counted_in(tokenizer: Any) -> None:
    chat = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    chat.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}answer:"
    prompts = draw_prompts(Dataset("t", "t", TEXTS), chat, 1, 14, seed=0).prompts
    text = str(chat.decode(list(prompts[0])))
    assert len(prompts[0]) == 14
    assert text.startswith("<u>")
    assert text.endswith("</u>answer:")


@pytest.mark.parametrize("kind", ["docs", "code"])
def test_built_in_prompts_come_from_held_out_documents_only(kind: Any) -> None:
    texts = corpus_dataset(kind, kind).texts
    assert len(texts) >= 256
    training = "\n\n".join(d.text for d in documents() if not d.held_out)
    long = [text for text in texts if len(text) > 400]
    assert long
    assert not [text for text in long if text in training]
