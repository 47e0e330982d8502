"""Arrivals and online requests: traces as they are, rates, exact lengths, bad files refused."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from experiments.errors import UserError
from experiments.run.datasets import Dataset, prompts_of
from experiments.run.weights import SCALE_MODELS
from experiments.run.workloads import generated, read_azure_trace, sampled

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n"
TEXTS = tuple(f"Text {number} tells of the number {number}." for number in range(7))
DATASET = Dataset("test", "made up", TEXTS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")


def test_generated_lengths_and_gaps_follow_their_distributions() -> None:
    rows = generated(20_000, 2.91, seed=0)
    assert rows["input_tokens"].mean() == pytest.approx(1228, rel=0.03)
    assert rows["output_tokens"].mean() == pytest.approx(213, rel=0.03)
    assert rows["input_tokens"].median() == pytest.approx(math.exp(6.6333), rel=0.03)
    assert rows["seconds"].iloc[0] == 0
    assert rows["input_tokens"].between(1, 14050).all()
    assert rows["output_tokens"].max() == 1000
    gaps = rows["seconds"].diff().dropna()
    assert gaps.mean() == pytest.approx(1 / 2.91, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert rows.equals(generated(20_000, 2.91, seed=0))
    assert not rows[:9].equals(generated(9, 2.91, seed=1))


def trace_of(*rows: tuple[float, int, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["seconds", "input_tokens", "output_tokens"])


@pytest.mark.parametrize("process", ["trace", "poisson"])
def test_sampled_rows_keep_both_lengths_and_none_is_taken_twice(process: Any) -> None:
    trace = trace_of(*((float(n), n + 1, 2 * n + 1) for n in range(1000)))
    rows = sampled(trace, 300, 2.91, process, seed=3)
    assert (rows["output_tokens"] == 2 * rows["input_tokens"] - 1).all()
    assert rows["input_tokens"].nunique() == 300
    assert rows["seconds"].is_monotonic_increasing
    assert rows["seconds"].iloc[0] == 0
    assert 299 / rows["seconds"].iloc[-1] == pytest.approx(2.91, rel=0.2)
    assert rows.equals(sampled(trace, 300, 2.91, process, seed=3))
    assert not rows.equals(sampled(trace, 300, 2.91, process, seed=4))


def test_rows_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEADER}2024-05-10 00:00:02+00:00,5,6\n2024-05-10 00:00:00.5+00:00,7,8\n\n")
    assert read_azure_trace(path).equals(trace_of((0.0, 7, 8), (1.5, 5, 6)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "No columns to parse from file; give a CSV table"),
        (f"{HEADER}{GOOD}soon,1,2\n", "line 3 is no request: .*soon"),
        (f"{HEADER}{GOOD}\n{GOOD.replace('44', '0')}", "line 4 is no .*'GeneratedTokens': '0'"),
        (HEADER, "no requests below its header"),
        ("TIMESTAMP\n2023-11-16\n", "GeneratedTokens.*are in the"),
    ],
)
def test_a_malformed_trace_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_azure_trace(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_trace_too_short_or_without_time_is_refused() -> None:
    trace = trace_of(*[(1.0, 1, 1)] * 3)
    with pytest.raises(UserError, match="has 3 requests, 4 are asked for"):
        sampled(trace, 4, 1.0, "poisson", seed=0)
    with pytest.raises(UserError, match="all arrive at once"):
        sampled(trace, 2, 1.0, "trace", seed=0)
    assert sampled(trace, 1, 1.0, "trace", seed=0)["seconds"].tolist() == [0.0]


def drawn(tokenizer: Any, lengths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    return prompts_of(lengths, DATASET, tokenizer, seed)[0]


def test_prompts_have_exactly_their_lengths_and_use_every_text_once_a_pass(tokenizer: Any) -> None:
    texts = [tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"] for text in TEXTS]
    lengths = [1, 500, 2, 37]
    assert [len(prompt) for prompt in drawn(tokenizer, lengths)] == lengths
    assert prompts_of(lengths, DATASET, tokenizer, 0)[1] > 1
    two_texts = [max(map(len, texts)) + 1] * 3
    begins = [
        text[:9] for p in drawn(tokenizer, two_texts) for text in texts if text[:9] == [*p[:9]]
    ]
    assert len(set(map(tuple, begins))) == 3
    assert prompts_of(two_texts, DATASET, tokenizer, 0)[1] == 1


def test_a_prompt_too_short_for_the_chat_template_goes_without() -> None:
    chat: Any = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    chat.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}answer:"
    short, long = drawn(chat, [2, 30])
    assert (len(short), len(long)) == (2, 30)
    assert "<u>" not in chat.decode(list(short))
    assert chat.decode(list(long)).startswith("<u>")
    assert chat.decode(list(long)).endswith("</u>answer:")
