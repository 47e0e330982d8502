"""Traces of other projects, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemoe.foreign_trace import COLUMNS, ForeignTrace
from finemoe.offload.policy import ModelShape
from finemoe.trace import TraceError

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


def changed(path: Path, frame: pd.DataFrame) -> ForeignTrace:
    frame.to_csv(path / "t.csv", index=False)
    return ForeignTrace(path / "t.csv")


def test_requests_by_hand(path: Path) -> None:
    trace = ForeignTrace(path)
    assert trace.header.shape == ModelShape(2, 4, 2, 0)
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
    assert all(step.logits is None for step in (*four.steps, *nine.steps))


def test_a_given_shape_is_taken(path: Path) -> None:
    trace = ForeignTrace(path, ModelShape(2, 6, 2, 16))
    assert trace.header.shape == ModelShape(2, 6, 2, 16)
    assert trace.request(9).steps[0].counts.tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]


def test_prefill_steps_are_one_iteration(tmp_path: Path) -> None:
    """A prompt that came in two chunks is one prefill, and does not hide a first decode step."""
    frame = table()
    frame.loc[frame.index[10:12], "step"] = 1
    four = changed(tmp_path, frame).request(4)
    assert [step.tokens for step in four.steps] == [2, 1, 1]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("phase", "train", "has the phase 'train'; write prefill or decode"),
        ("expert", "x", "is no table of routing rows"),
        ("expert", 2**31 - 1, r"has expert 2147483647, not in 0..4095"),
        ("weight", "inf", "has weights that are NaN or infinite"),
        ("layer", 7, "request 4 routes nothing in layer 0 of its step 0"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, column: str, value: Any, message: str) -> None:
    frame = table().astype({column: object})
    frame.loc[6, column] = value
    if value == 7:
        frame.loc[frame["layer"] == 0, "layer"] = 2
    with pytest.raises(TraceError, match=message) as caught:
        list(changed(tmp_path, frame).requests())
    assert "\n" not in str(caught.value)


def test_numbers_beyond_the_given_model_are_refused(path: Path) -> None:
    with pytest.raises(TraceError, match=r"has expert 3, not in 0..2; give the model it is of"):
        ForeignTrace(path, ModelShape(2, 3, 2, 16))
    with pytest.raises(TraceError, match="has rank 1, not in"):
        ForeignTrace(path, ModelShape(2, 4, 1, 16))


def test_missing_steps_are_refused(tmp_path: Path) -> None:
    frame = table()
    no_prefill = frame[(frame["request"] != 4) | (frame["phase"] != "prefill")]
    with pytest.raises(TraceError, match="request 4 has no prefill rows"):
        changed(tmp_path, no_prefill).request(4)
    frame.loc[frame["step"] == 2, "step"] = 3
    with pytest.raises(TraceError, match="request 4 decodes step 3 after 1"):
        changed(tmp_path, frame).request(4)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere.csv", "no such file"), (tmp_path, "is no table")):
        with pytest.raises(TraceError, match=message):
            ForeignTrace(path)
    for frame, message in (
        (table().drop(columns=["rank", "weight"]), "lacks the columns rank, weight; name them so"),
        (table().iloc[:0], "has no rows"),
    ):
        with pytest.raises(TraceError, match=message):
            changed(tmp_path, frame)


def test_rows_that_fill_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    zeros = {name: pa.nulls(2**21, kind).fill_null(0) for name, kind in
             zip(COLUMNS.names, COLUMNS.types, strict=True) if name != "phase"}  # fmt: skip
    pq.write_table(pa.table({**zeros, "phase": ["prefill"] * 2**21}), path)
    with pytest.raises(TraceError, match=r"bytes that unpack to 104,857,600"):
        ForeignTrace(path)
