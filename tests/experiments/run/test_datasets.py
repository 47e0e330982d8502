"""Prompts: schemas, exact lengths, templates, determinism, nothing from the training text."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import UserError
from experiments.run.datasets import conversations, corpus_dataset, documents, shared_prefixes

TEXTS = ("What is the capital of France, and how many live there?", "Tell me about whales.")
LMSYS = [{"conversation": [{"role": "user", "content": text}]} for text in TEXTS]
SHAREGPT = [
    {"conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": text}]}
    for text in TEXTS
]


@pytest.mark.parametrize("rows", [LMSYS, SHAREGPT], ids=["lmsys", "sharegpt"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_both_schemas_are_read(rows: list[dict[str, Any]], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert conversations("test", str(path), "train").texts == TEXTS


PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=12)


@given(PROMPTS)
def test_a_shared_prefix_is_the_longest_with_any_other(prompts: list[tuple[int, ...]]) -> None:
    def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return max(n for n in range(min(len(one), len(other)) + 1) if one[:n] == other[:n])

    assert shared_prefixes(prompts) == [
        max((common(one, other) for j, other in enumerate(prompts) if j != i), default=0)
        for i, one in enumerate(prompts)
    ]


@pytest.mark.parametrize("kind", ["docs", "code"])
def test_built_in_prompts_come_from_held_out_documents_only(kind: Any) -> None:
    texts = corpus_dataset(kind, kind).texts
    assert len(texts) >= 256
    training = "\n\n".join(d.text for d in documents() if not d.held_out)
    long = [text for text in texts if len(text) > 400][::4]
    assert long
    assert not [text for text in long if text in training]


ODD = [
    (None, "NoneType where an object is due"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "no turn by user or human, only by .'gpt"),
    ({"conversations": [{"from": "human", "value": ["x"]}]}, "no text in turn 1, but .'x'"),
    ({"conversations": [{"from": "human", "value": "\ud800"}]}, "surrogates not allowed"),
]


@pytest.mark.parametrize(("row", "cause"), ODD)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_odd_rows_are_skipped(
    row: Any, cause: str, suffix: str, tmp_path: Path, capsys: Any
) -> None:
    path, rows = tmp_path / f"rows.{suffix}", [SHAREGPT[0], row, LMSYS[1]]
    lines = [json.dumps(one) for one in rows]
    path.write_text("\n".join(lines) if suffix == "jsonl" else json.dumps(rows))
    read = conversations("test", str(path), "train")
    assert read.texts == TEXTS
    assert read.source == f"{path} (skipped 1 row of 3)"
    found = capsys.readouterr().err
    assert re.search(f"^skipped 1 row of {path}: row 2: .*{cause}.*\n$", found)
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"no usable prompt: .* 1: .*{cause}"):
        conversations("test", str(path), "train")


def test_a_line_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(LMSYS[0]) + '\n{"conversation": \n')
    with pytest.raises(UserError, match=r"cannot read .*rows.jsonl as jsonl: .*; mend or replace"):
        conversations("test", str(path), "train")
