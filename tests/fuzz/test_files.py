"""Files that somebody damaged or wrote by hand: each is read as what it says, or refused in a line.

Nothing else may be raised, whatever a file holds, and no file may fill the memory.
"""

import copy
import hashlib
import io
import json
import math
import resource
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import UserError
from experiments.judge.frame import ResultsFolder, run_frame
from experiments.reproduce.driver import adopt
from experiments.run.datasets import conversations
from experiments.run.records import of_these_weights, read_record
from experiments.run.workloads import read_azure_trace
from finemoe.foreign_trace import foreign_trace, is_foreign, routed_stream
from finemoe.offload.policy import ModelShape
from finemoe.trace import Trace, TracedRequest, TraceError
from tests.experiments.judge.test_frame import leave_run
from tests.finemoe.test_foreign_trace import ROWS
from tests.fuzz import fuzzed

GIGABYTE = 2**20  # of the KiB that getrusage counts
FOREIGN = ModelShape(2, 4, 2, 16)

odd_numbers = st.sampled_from(
    [0, -1, 1, 7, 0.5, -0.0, 2**16, 2**31 - 1, 2**31, 2**63, 10**30, 1e308, math.nan, math.inf]
)
odd_texts = st.sampled_from(
    ["", "x", "nan", "1e999", "../..", "a/b", "${x}", "${oc.env:HOME}", "???", "\x1b[2J", "\0",
     "\ud800", "<b>", "[/b]", "x" * 300, "2024-13-01", "None", "é", "\u2028"]
)  # fmt: skip
odd: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), odd_numbers, odd_texts,
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"a": [1, {"b": "c"}]}]).map(copy.deepcopy),
)  # fmt: skip


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def read_or_refused(read: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Return what is read, or None if it is refused in one line."""
    try:
        return read()
    except errors as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Flip bits, overwrite, cut out, put in or cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        stop = start + draw(st.sampled_from([0, 1, 1, 2, 4, 16, 10**6]))
        data[start:stop] = draw(st.binary(max_size=16) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
    return bytes(data)


@st.composite
def mutated(draw: st.DrawFn, good: Any) -> Any:
    """Replace, leave out or add values anywhere in a JSON tree."""
    tree = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        part: Any = {"": tree}
        key: Any = ""
        while isinstance(part[key], dict | list) and part[key] and draw(st.integers(0, 4)):
            part = part[key]
            key = draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
        if part is not tree and not draw(st.integers(0, 4)) and isinstance(part, dict) and key:
            del part[key]
        else:
            part[key] = draw(odd)
            tree = part[""] if key == "" else tree
    return tree


@st.composite
def odd_cells(draw: st.DrawFn, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Put up to three odd values into a table."""
    columns = {name: list(values) for name, values in columns.items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(list(columns)))
        columns[name][draw(st.integers(0, len(columns[name]) - 1))] = draw(odd)
    return columns


def maybe_damaged(content: bytes) -> st.SearchStrategy[bytes]:
    return st.just(content) | damaged(content)


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def comma_separated(columns: dict[str, list[Any]]) -> bytes:
    lines = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    texts = [",".join("" if cell is None else str(cell) for cell in line) for line in lines]
    return "\n".join(texts).encode("utf-8", "surrogatepass")


def parquet(columns: dict[str, list[Any]]) -> bytes:
    """Return a table of the types that its values ask for, or of texts."""
    arrays = {}
    for name, values in columns.items():
        try:
            # Of nested values that have no common type, pyarrow writes none, or crashes.
            arrays[name] = pa.array([ascii(x) if isinstance(x, dict | list) else x for x in values])
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            arrays[name] = pa.array([ascii(value) for value in values])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def check_requests(make: Callable[[], Trace]) -> None:
    """Read a trace that may be refused; whatever is read is sound."""

    def read() -> tuple[ModelShape, list[TracedRequest]]:
        trace = make()
        return trace.header.shape, list(trace.requests())

    shape, requests = read_or_refused(read, TraceError) or (FOREIGN, [])
    for request in requests:
        assert all(token >= 0 for token in (*request.prompt, *request.output))
        assert request.steps
        for step in request.steps:
            assert step.counts.shape == (shape.layers, shape.experts)
            assert step.counts.min() >= 0
            sums = step.counts.astype(np.int64).sum(axis=1)
            assert ((sums >= 1) & (sums <= step.tokens * shape.top_k)).all()
            assert step.logits is None or np.isfinite(step.logits).all()


@fuzzed(25)
@given(st.data())
def test_foreign_traces(folder: Path, data: st.DataObject) -> None:
    good: Any = pd.read_csv(io.StringIO(ROWS)).to_dict("list")
    path = folder / data.draw(st.sampled_from(["t.csv", "t.parquet"]))
    columns = data.draw(odd_cells(good))
    content = comma_separated(columns) if path.suffix == ".csv" else parquet(columns)
    path.write_bytes(data.draw(maybe_damaged(content)))
    shape = data.draw(st.sampled_from([None, FOREIGN]))
    is_foreign(path)
    check_requests(lambda: foreign_trace(path, shape))


@fuzzed(25)
@given(st.data())
def test_damaged_streams(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(["s.npy", "s.npz", "s.jsonl"]))
    ids, buffer = np.arange(24, dtype=np.int16).reshape(6, 2, 2) % 4, io.BytesIO()
    if path.suffix == ".jsonl":
        lines = [{"layer": layer, "experts": ids[:, layer].tolist()} for layer in range(2)]
        buffer.write(b"\n".join(map(dumped, lines)))
    else:
        (np.save if path.suffix == ".npy" else np.savez)(buffer, ids)
    path.write_bytes(data.draw(damaged(buffer.getvalue())))
    check_requests(lambda: routed_stream(path, FOREIGN, prompt=2, output=2))


TURN = {"from": "human", "value": "a text"}
ROLE = {"role": "user", "content": "another text"}
CONVERSATIONS = [{"conversations": [{"from": "gpt"}, TURN]}, {"conversation": [ROLE]}] * 2


@fuzzed(25)
@given(data=st.data())
def test_datasets(folder: Path, data: st.DataObject) -> None:
    held = data.draw(mutated(CONVERSATIONS).filter(lambda tree: isinstance(tree, list)))
    path = folder / data.draw(st.sampled_from(["rows.json", "rows.jsonl"]))
    content = dumped(held) if path.suffix == ".json" else b"\n".join(map(dumped, held))
    path.write_bytes(data.draw(maybe_damaged(content)))
    found = read_or_refused(lambda: conversations("fuzzed", str(path), "train"), UserError)
    if found is not None:
        assert all(text.strip() == text != "" for text in found.texts)
        assert all(text.encode() for text in found.texts)


ARRIVALS = {
    "TIMESTAMP": ["2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319600", "2023-11-16"],
    "ContextTokens": ["374", "396", "879"],
    "GeneratedTokens": ["44", "109", "55"],
}


@fuzzed(25)
@given(data=st.data())
def test_arrivals(folder: Path, data: st.DataObject) -> None:
    path = folder / f"arrivals.{data.draw(st.sampled_from(['csv', 'gz', 'zip']))}"
    content = comma_separated(data.draw(odd_cells(ARRIVALS)))
    path.write_bytes(data.draw(maybe_damaged(content)))
    trace = read_or_refused(lambda: read_azure_trace(path), UserError)
    if trace is not None:
        assert trace["seconds"].is_monotonic_increasing
        assert np.isfinite(trace).all(axis=None)
        assert trace["seconds"].iloc[0] == 0
        lengths = trace[["input_tokens", "output_tokens"]]
        assert lengths.ge(1).all(axis=None)
        assert lengths.le(2**31).all(axis=None)


@cache
def good_record(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    record = json.loads(leave_run(folder / "run").read_text())
    table = pq.read_table(folder / "run" / "requests.parquet").to_pydict()
    return {key: one for key, one in record.items() if key != "requests_sha256"}, table


def read_run(folder: Path) -> pd.DataFrame:
    of_these_weights(read_record(folder / "run.json"))
    adopt(ResultsFolder(folder), folder, ())
    return run_frame([folder])


@fuzzed(50)
@given(data=st.data())
def test_run_records_and_their_request_tables(folder: Path, data: st.DataObject) -> None:
    record, columns = good_record(folder)
    if data.draw(st.booleans()):
        table, record = parquet(columns), data.draw(mutated(record))
    else:
        table = data.draw(maybe_damaged(parquet(data.draw(odd_cells(columns)))))
        sha256 = {"requests_sha256": hashlib.sha256(table).hexdigest()}
        record = record | data.draw(st.sampled_from([{}, sha256]))
    (folder / "run" / "run.json").write_bytes(data.draw(maybe_damaged(dumped(record))))
    (folder / "run" / "requests.parquet").write_bytes(table)
    frame = read_or_refused(lambda: read_run(folder / "run"), UserError)
    if frame is not None:
        (row,) = frame.to_dict("records")
        assert 0 <= row["tpot_s"] < math.inf or math.isnan(row["tpot_s"])
        assert row["mode"] in ("measured", "emulated", "simulated")
        assert row["requests"] > 0
