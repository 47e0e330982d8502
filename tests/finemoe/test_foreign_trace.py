"""Traces of other projects, worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemoe.foreign_trace import COLUMNS, foreign_trace, is_foreign, routed_stream
from finemoe.offload.policy import ModelShape
from finemoe.offload.routed import softmax
from finemoe.trace import Trace, TraceError
from tests.command import ROOT

SHARED = ROOT.parent / "shared"

# Two layers, four experts, two a token. Request 4 has a prompt of two tokens and decodes twice;
# request 9 has a prompt of one token, and is written first.
ROWS = """\
request,phase,step,layer,rank,expert,weight
9,prefill,0,0,0,1,0.9
9,prefill,0,0,1,2,0.1
9,prefill,0,1,0,3,0.6
9,prefill,0,1,1,0,0.4
4,decode,2,0,0,2,0.5
4,decode,2,0,1,3,0.5
4,decode,2,1,0,3,0.5
4,decode,2,1,1,1,0.5
4,prefill,0,0,0,0,0.7
4,prefill,0,0,1,1,0.3
4,prefill,0,0,0,0,0.8
4,prefill,0,0,1,3,0.2
4,prefill,0,1,0,2,0.6
4,prefill,0,1,1,1,0.4
4,prefill,0,1,0,2,0.6
4,decode,1,0,0,0,0.5
4,decode,1,0,1,1,0.5
4,decode,1,1,0,2,0.5
4,decode,1,1,1,0,0.5
"""


def table() -> pd.DataFrame:
    lines = [line.split(",") for line in ROWS.splitlines()]
    frame = pd.DataFrame(lines[1:], columns=lines[0])
    kinds = dict.fromkeys(["request", "step", "layer", "rank", "expert"], int)
    return frame.astype({**kinds, "weight": float})


@pytest.fixture(params=["csv", "parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / f"trace.{request.param}"
    if request.param == "csv":
        file.write_text(ROWS)
    else:
        table().to_parquet(file)
    return file


def changed(path: Path, frame: pd.DataFrame) -> Trace:
    frame.to_csv(path / "t.csv", index=False)
    return foreign_trace(path / "t.csv")


def test_requests_by_hand(path: Path) -> None:
    trace = foreign_trace(path)
    assert trace.header.shape == ModelShape(2, 4, 2, 8)
    assert trace.numbers == (4, 9)
    four, nine = trace.requests()
    assert (four.number, four.prompt, four.output) == (4, (), ())
    assert trace.prompt(4) == ()
    assert [step.tokens for step in four.steps] == [2, 1, 1]
    assert [step.counts.tolist() for step in four.steps] == [
        [[2, 1, 0, 1], [0, 1, 2, 0]],
        [[1, 1, 0, 0], [1, 0, 1, 0]],
        [[0, 0, 1, 1], [0, 1, 0, 1]],
    ]
    assert [step.counts.tolist() for step in nine.steps] == [[[0, 1, 1, 0], [1, 0, 0, 1]]]
    # Shares by weight, of a prefill for each of its tokens; what was chosen before stands for a
    # token's embedding.
    steps: Any = four.steps
    prefill, first, _ = (softmax(step.logits) for step in steps)
    assert prefill == pytest.approx(
        np.array([[[0.75, 0.15, 0, 0.1]] * 2, [[0, 0.25, 0.75, 0]] * 2]), abs=1e-6
    )
    assert first == pytest.approx(np.array([[[0.5, 0.5, 0, 0]], [[0.5, 0, 0.5, 0]]]), abs=1e-6)
    _, decoded, last = (step.embeddings for step in steps)
    assert decoded.tolist() == [pytest.approx([0.75, 0.15, 0, 0.1, 0, 0.25, 0.75, 0])]
    assert last.tolist() == [[0.5, 0.5, 0, 0, 0.5, 0, 0.5, 0]]


def test_a_given_shape_is_taken(path: Path) -> None:
    trace = foreign_trace(path, ModelShape(2, 6, 2, 16))
    assert trace.header.shape == ModelShape(2, 6, 2, 12)
    assert trace.request(9).steps[0].counts.tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]


def test_prefill_steps_are_one_iteration(tmp_path: Path) -> None:
    """A prompt that came in two chunks is one prefill, and does not hide a first decode step."""
    frame = table()
    frame.loc[frame.index[10:12], "step"] = 1
    four = changed(tmp_path, frame).request(4)
    assert [step.tokens for step in four.steps] == [2, 1, 1]


def cell(column: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return what changes one cell of a table."""
    return lambda frame: frame.astype({column: object}).where(
        (frame.index != 6)[:, None] | (frame.columns != column), value
    )


ODD: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "has the phase 'train'; write prefill or decode": cell("phase", "train"),
    "is no table of routing rows": cell("expert", "x"),
    "has expert 2147483647, not in 0..4095": cell("expert", 2**31 - 1),
    "has weights that are NaN or infinite": cell("weight", "inf"),
    "request 4 routes nothing in layer 0 of its step 0": lambda it: it.replace({"layer": {0: 2}}),
    "request 4 has no prefill rows": lambda it: it[(it["request"] != 4) | (it["step"] > 0)],
    "request 4 decodes step 3 after 1": lambda it: it.replace({"step": {2: 3}}),
    "lacks the columns step, rank; name them so": lambda it: it.drop(columns=["rank", "step"]),
    "has no rows": lambda it: it.iloc[:0],
}


@pytest.mark.parametrize("message", ODD)
def test_odd_tables_are_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        list(changed(tmp_path, ODD[message](table())).requests())
    assert "\n" not in str(caught.value)


def test_other_files_and_models_are_refused(path: Path) -> None:
    with pytest.raises(TraceError, match=r"has expert 3, not in 0..2; give the model it is of"):
        foreign_trace(path, ModelShape(2, 3, 2, 16))
    with pytest.raises(TraceError, match="has rank 1, not in"):
        foreign_trace(path, ModelShape(2, 4, 1, 16))
    with pytest.raises(TraceError, match="no such file"):
        foreign_trace(path.with_name("nowhere.csv"))
    with pytest.raises(TraceError, match="is no table"):
        foreign_trace(path.parent)


def test_rows_that_fill_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    zeros = {name: pa.nulls(2**21, kind).fill_null(0) for name, kind in
             zip(COLUMNS.names, COLUMNS.types, strict=True) if name != "phase"}  # fmt: skip
    pq.write_table(pa.table({**zeros, "phase": ["prefill"] * 2**21}), path)
    with pytest.raises(TraceError, match=r"bytes that unpack to 104,857,600"):
        foreign_trace(path)


def test_other_words_for_the_same_columns(tmp_path: Path) -> None:
    """A preamble, phases as numbers, other names, weights left out: as runtimes write them."""
    lines = ROWS.replace("prefill", "0").replace("decode", "1").splitlines()
    rows = [line.rpartition(",")[0] for line in lines[1:]]
    head = "req_id,phase,token_idx,layer_id,k,expert_id"
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["# model: one", "# budget: 4096 MiB", head, *rows]) + "\n")
    ours = tmp_path / "ours.csv"
    ours.write_text(ROWS)
    mine, due = (
        [(step.tokens, step.counts.tolist()) for one in trace.requests() for step in one.steps]
        for trace in (foreign_trace(path), foreign_trace(ours))
    )
    assert mine == due


# Three tokens, two layers, two of four experts each.
IDS = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 0], [1, 2]]], np.int16)
SHAPE = ModelShape(2, 4, 2, 0)


def as_lines(path: Path, ids: np.ndarray) -> None:
    chunks = [(0, ids[:2]), (1, ids[:2]), (0, ids[2:]), (1, ids[2:])]
    lines = [{"layer_number": n + 1, "topk_indices": of[:, n].tolist()} for n, of in chunks]
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vllm.npy", lambda path: np.save(path, IDS)),
        (
            "layers.npz",
            lambda path: np.savez(path, weights=IDS / 9, experts=IDS.swapaxes(0, 1), meta="text"),
        ),
        ("router.jsonl", lambda path: as_lines(path, IDS)),
    ],
)
def test_a_stream_is_cut_into_requests(name: str, write: Any, tmp_path: Path) -> None:
    write(path := tmp_path / name)
    assert is_foreign(path)
    (one,) = routed_stream(path, SHAPE, prompt=2, output=2).requests()
    assert [step.tokens for step in one.steps] == [2, 1]
    assert [step.counts.tolist() for step in one.steps] == [
        [[1, 2, 1, 0], [1, 0, 1, 2]],
        [[1, 0, 0, 1], [0, 1, 1, 0]],
    ]
    prefill: Any = one.steps[0]
    shares = [[[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]], [[0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]]]
    assert softmax(prefill.logits) == pytest.approx(np.array(shares), abs=1e-6)
    assert prefill.embeddings.tolist() == [[0] * 8, [0.5, 0.5, 0, 0, 0, 0, 0.5, 0.5]]
    assert len(routed_stream(path, SHAPE, prompt=1, output=1)) == 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS + 1, r"has expert 4, not in 0..3; give the model it is of"),
        (IDS[..., :1], r"has ids of int16, 2 layers, top 1, not whole numbers of 2, top 2"),
        (IDS.astype(float), "has ids of float64"),
        (IDS[:, 0], "has no array of three dimensions"),
        (IDS[:2], r"has 2 tokens in a row, a request takes 3; lower workload"),
    ],
)
def test_odd_streams_are_refused(ids: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", ids)
    with pytest.raises(TraceError, match=message) as caught:
        routed_stream(tmp_path / "t.npy", SHAPE, prompt=2, output=2)
    assert "\n" not in str(caught.value)


def test_lines_that_say_no_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"experts": [[0, 1]]}')
    with pytest.raises(TraceError, match="line 1 lacks 'layer'; name it so"):
        routed_stream(path, SHAPE, prompt=1, output=1)


@pytest.mark.skipif(not SHARED.exists(), reason="there is no ../shared")
@pytest.mark.parametrize("text", ["code", "general"])
def test_real_routing_of_a_real_model(text: str) -> None:
    """48 layers choose 8 of 128 experts for each of 8,000 tokens."""
    path = SHARED / "data" / f"qwen3-30b-a3b-{text}.npz"
    trace = routed_stream(path, ModelShape(48, 128, 8, 0), prompt=37, output=127)
    assert len(trace) == 8000 // 163
    last = trace.request(len(trace) - 1)
    assert [step.tokens for step in last.steps] == [37] + [1] * 126
    assert all((step.counts.sum(axis=1) == 8 * step.tokens).all() for step in last.steps)
