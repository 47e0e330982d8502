"""Files that somebody damaged or wrote by hand: each is read as what it says, or refused in a line.

Nothing else may be raised, whatever a file holds, and no file may fill the memory.
"""

from __future__ import annotations

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
from safetensors.numpy import save_file

from baselines.activation_matrices import MatrixCollection
from baselines.promoe import LearnedPredictor
from experiments.errors import UserError
from experiments.judge.frame import ResultsFolder, run_frame
from experiments.judge.report import write
from experiments.reproduce.results import adopt
from experiments.run.datasets import conversations
from experiments.run.records import of_these_weights, read_record
from experiments.run.workloads import read_azure_trace
from finemoe.expert_map import ExpertMapStore, StoreMismatch
from finemoe.foreign_trace import ForeignTrace, RoutedStream, is_foreign
from finemoe.offload.policy import ModelShape
from finemoe.trace import HEADER_KEY, TracedRequest, TraceError, TraceReader, fingerprint
from tests.experiments.judge.test_claims import Results
from tests.experiments.judge.test_frame import leave_run
from tests.finemoe.test_foreign_trace import ROWS
from tests.finemoe.test_trace import a_trace, assert_same, write_trace
from tests.fuzz import fuzzed

GIGABYTE = 2**20  # of the KiB that getrusage counts
SHAPE = ModelShape(2, 3, 1, 4)

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


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


# Routing traces -----------------------------------------------------------------------------------


@cache
def good_trace(folder: Path) -> tuple[bytes, list[pa.Table], dict[str, Any]]:
    a_trace(folder / "good")
    with pq.ParquetFile(folder / "good") as file:
        tables = [file.read_row_group(group) for group in range(2)]
        header = json.loads(file.metadata.metadata[HEADER_KEY])
    return (folder / "good").read_bytes(), tables, header


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def read_trace(path: Path) -> tuple[ModelShape, bool, list[TracedRequest]]:
    is_foreign(path)
    with TraceReader(path) as reader:
        foreign = "foreign" in reader.header.provenance
        return reader.header.shape, foreign, list(reader.requests())


def check_requests(found: tuple[ModelShape, bool, list[TracedRequest]] | None) -> None:
    shape, foreign, requests = found or (SHAPE, False, [])
    for request in requests:
        assert all(token >= 0 for token in (*request.prompt, *request.output))
        assert request.steps
        for step in request.steps:
            sums = step.counts.astype(np.int64).sum(axis=1)
            assert step.counts.shape == (shape.layers, shape.experts)
            assert step.counts.min() >= 0
            due = step.tokens * shape.top_k
            assert step.tokens >= 1
            assert all(1 <= one <= due for one in sums) if foreign else set(sums) == {due}
            for values in (step.logits, step.embeddings, step.hidden_states):
                assert values is None or np.isfinite(values).all()


@fuzzed(25)
@given(st.data())
def test_damaged_traces(folder: Path, data: st.DataObject) -> None:
    path, good = folder / "t", good_trace(folder)[0]
    path.write_bytes(data.draw(damaged(good)))
    found = read_or_refused(lambda: read_trace(path), TraceError)
    if found is not None:
        for request, due in zip(found[2], read_trace(folder / "good")[2], strict=True):
            assert_same(request, due)


@st.composite
def odd_cells(draw: st.DrawFn, table: pa.Table) -> pa.Table:
    """Change values of a trace's columns, which keep their types."""
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, table.num_columns - 1))
        field, values = table.schema.field(place), table.column(place).to_pylist()
        index = draw(st.integers(0, len(values) - 1))
        if pa.types.is_binary(field.type):
            size, good = len(values[index]), values[index]
            values[index] = draw(
                st.sampled_from([b"", bytes(size), b"\xff" * size, b"\x7f" * size, bytes(size + 2)])
                | (damaged(good) if good else st.binary(max_size=8))
            )
        else:
            values[index] = draw(st.sampled_from([0, -1, 1, 2, 3, 2**31 - 1]))
        table = table.set_column(place, field, [pa.array(values, field.type)])
    return table


@fuzzed(25)
@given(st.data())
def test_traces_rewritten_with_odd_values(folder: Path, data: st.DataObject) -> None:
    _, tables, header = good_trace(folder)
    odd_tables = [data.draw(odd_cells(table)) for table in tables]
    entries = [[i, len(table), fingerprint(table)] for i, table in enumerate(odd_tables)]
    header = {**header, "requests": entries}
    if data.draw(st.booleans()):
        header = data.draw(mutated(header))
    write_trace(folder / "t", odd_tables, header)
    check_requests(read_or_refused(lambda: read_trace(folder / "t"), TraceError))


@fuzzed(25)
@given(st.data())
def test_foreign_traces(folder: Path, data: st.DataObject) -> None:
    columns: Any = pd.read_csv(io.StringIO(ROWS)).to_dict("list")
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(list(columns)))
        index = data.draw(st.integers(0, len(columns[name]) - 1))
        columns[name][index] = data.draw(odd_numbers | odd_texts | st.none())
    name = data.draw(st.sampled_from(["t.csv", "t.parquet"]))
    cells = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    content = comma_separated(cells) if name == "t.csv" else foreign_parquet(columns)
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    path = folder / name
    path.write_bytes(content)
    shape = data.draw(st.sampled_from([None, ModelShape(2, 4, 2, 16)]))

    def read() -> tuple[ModelShape, bool, list[TracedRequest]]:
        is_foreign(path)
        trace = ForeignTrace(path, shape)
        return trace.header.shape, True, list(trace.requests())

    check_requests(read_or_refused(read, TraceError))


@fuzzed(40)
@given(st.data())
def test_damaged_streams(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["s.npy", "s.npz", "s.jsonl"]))
    ids, buffer = np.arange(24, dtype=np.int16).reshape(6, 2, 2) % 4, io.BytesIO()
    lines = "\n".join(json.dumps({"layer": n, "experts": ids[:, n].tolist()}) for n in range(2))
    if name == "s.jsonl":
        buffer.write(lines.encode())
    else:
        (np.save if name == "s.npy" else np.savez)(buffer, ids)
    (folder / name).write_bytes(data.draw(damaged(buffer.getvalue())))

    def read() -> tuple[ModelShape, bool, list[TracedRequest]]:
        trace = RoutedStream(folder / name, ModelShape(2, 4, 2, 0), prompt=2, output=2)
        return trace.header.shape, True, list(trace.requests())

    check_requests(read_or_refused(read, TraceError))


def comma_separated(cells: list[list[Any]]) -> bytes:
    lines = [",".join("" if cell is None else str(cell) for cell in line) for line in cells]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def foreign_parquet(columns: dict[str, list[Any]]) -> bytes:
    """Return a table of the types that its values ask for, or of texts."""
    arrays = {}
    for name, values in columns.items():
        try:
            # Of nested values that have no common type, pyarrow writes none, or crashes.
            arrays[name] = pa.array([ascii(x) if isinstance(x, dict | list) else x for x in values])
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            arrays[name] = pa.array([ascii(value) for value in values])
    return parquet(pa.table(arrays))


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


# Stores and predictors ----------------------------------------------------------------------------


@st.composite
def arrays(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """Change some of the arrays of a file: values, type, shape or name."""
    changed = dict(good)
    for name in draw(st.lists(st.sampled_from(list(good)), max_size=2)):
        array = changed.pop(name, good[name])
        kind = draw(st.integers(0, 5))
        if kind == 0 and array.size:
            array = array.astype(np.float32)
            value = draw(st.sampled_from([math.nan, math.inf, -1, 0.25, 1, 3, 1e30, 1e-30]))
            array.flat[draw(st.integers(0, array.size - 1))] = value
        elif kind == 1:
            array = array.astype(draw(st.sampled_from([np.float64, np.float16, np.int8, bool])))
        elif kind == 2 and array.size:
            array = np.array(array[draw(st.sampled_from([0, None, slice(1), slice(0)]))])
        elif kind == 3 and array.ndim:
            array = np.ascontiguousarray(array.swapaxes(0, -1))
        elif kind == 4:
            continue
        changed[name + draw(st.sampled_from(["", "", "", "x"]))] = array
    return changed


def read_store(path: Path) -> list[Any]:
    store = ExpertMapStore(SHAPE, 4, 1)
    store.load(path, "a model")
    rows = np.full((2, 1, 3), 1 / 3, np.float32)
    return [store.maps, store.embeddings, store.redundancy(rows, np.ones((1, 4), np.float32))]


def read_collection(path: Path) -> list[Any]:
    collection = MatrixCollection(SHAPE, 4, "similar")
    collection.load(path, "a model")
    asked = np.ones((2, 3), np.float32)
    return [collection.matrices, collection.popularity, collection.similarity(asked)]


def read_predictor(path: Path) -> list[Any]:
    return [LearnedPredictor.load(path, SHAPE, 1).logits(0, np.ones((2, 4), np.float32))]


random = np.random.default_rng(0)
MAPS = {"maps": random.dirichlet(np.ones(3), (5, 2)), "embeddings": np.eye(5, 4)}
PREDICTOR = {"up": (1, 6, 4), "up_bias": (1, 6), "down": (1, 3, 6), "down_bias": (1, 3)}
LOADERS: list[tuple[Callable[[Path], list[Any]], dict[str, Any]]] = [
    (read_store, MAPS),
    (read_collection, {"matrices": np.arange(24).reshape(4, 2, 3)}),
    (read_predictor, {name: random.normal(size=shape) for name, shape in PREDICTOR.items()}),
]


@pytest.mark.parametrize(("read", "good"), LOADERS, ids=["store", "collection", "predictor"])
@fuzzed(25)
@given(data=st.data())
def test_stores_and_predictors(
    folder: Path, read: Callable[[Path], list[Any]], good: dict[str, Any], data: st.DataObject
) -> None:
    path = folder / "arrays.safetensors"
    told = data.draw(st.sampled_from([{"model_id": "a model", "distance": "1"}] * 4 + [{}]))
    good = {name: array.astype(np.float32) for name, array in good.items()}
    save_file(data.draw(arrays(good)), path, metadata=told)
    if not data.draw(st.integers(0, 3)):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    for values in read_or_refused(lambda: read(path), StoreMismatch) or []:
        assert np.isfinite(values).all()


# Datasets and arrivals ----------------------------------------------------------------------------

TURN = {"from": "human", "value": "a text"}
ROLE = {"role": "user", "content": "another text"}
CONVERSATIONS = [{"conversations": [{"from": "gpt"}, TURN]}, {"conversation": [ROLE]}] * 2


def strings(tree: Any) -> Iterator[str]:
    """Yield every text under a key by which a turn may have it."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key in ("value", "content") and isinstance(value, str):
            yield value.strip()
        if isinstance(value, dict | list):
            yield from strings(value)


@fuzzed(25)
@given(data=st.data())
def test_datasets(folder: Path, data: st.DataObject) -> None:
    held = data.draw(mutated(CONVERSATIONS).filter(lambda tree: isinstance(tree, list)))
    suffix = data.draw(st.sampled_from(["json", "jsonl", "parquet"]))
    content = {
        "json": dumped(held),
        "jsonl": b"\n".join(map(dumped, held)),
        "parquet": conversations_parquet(held),
    }[suffix]
    whole = data.draw(st.booleans())
    path = folder / f"rows.{suffix}"
    path.write_bytes(content if whole else data.draw(damaged(content)))
    found = read_or_refused(lambda: conversations("fuzzed", str(path), "train"), UserError)
    if found is not None:
        assert all(text.strip() == text != "" for text in found.texts)
        assert all(text.encode() for text in found.texts)
        if whole:
            assert set(found.texts) <= set(strings(held))


def conversations_parquet(held: list[Any]) -> bytes:
    """Return rows with conversations of turns, which a Parquet file cannot but have, or nulls."""
    turn = pa.struct({"from": pa.string(), "value": pa.string()})

    def text(value: Any) -> str | None:
        return value if isinstance(value, str) and value.isprintable() else None

    column = []
    for row in held:
        turns = row.get("conversations") if isinstance(row, dict) else None
        turns = [one for one in turns if isinstance(one, dict)] if isinstance(turns, list) else []
        column.append([{key: text(one.get(key)) for key in ("from", "value")} for one in turns])
    return parquet(pa.table({"conversations": pa.array(column, pa.list_(turn))}))


ARRIVALS = [
    ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
    ["2023-11-16 18:17:03.9799600", "374", "44"],
    ["2023-11-16 18:17:04.0319600", "396", "109"],
    ["2023-11-16 18:17:03", "879", "55"],
]


@fuzzed(25)
@given(data=st.data())
def test_arrivals(folder: Path, data: st.DataObject) -> None:
    cells: list[list[Any]] = [list(line) for line in ARRIVALS]
    for _ in range(data.draw(st.integers(0, 3))):
        line = data.draw(st.sampled_from(cells[1:] * 3 + cells[:1]))
        dates = st.sampled_from(["0001-01-01", "9999-12-31T23:59:59.999999999", "2023-11-16T00Z"])
        line[data.draw(st.integers(0, 2))] = data.draw(odd | dates)
    content = comma_separated(cells)
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    path = folder / f"arrivals.{data.draw(st.sampled_from(['csv', 'gz', 'zip']))}"
    path.write_bytes(content)
    trace = read_or_refused(lambda: read_azure_trace(path), UserError)
    if trace is not None:
        assert trace["seconds"].is_monotonic_increasing
        assert np.isfinite(trace).all(axis=None)
        assert trace["seconds"].iloc[0] == 0
        lengths = trace[["input_tokens", "output_tokens"]]
        assert (lengths.dtypes == np.int64).all()
        assert lengths.ge(1).all(axis=None)
        assert lengths.le(2**31).all(axis=None)


# Records ------------------------------------------------------------------------------------------


@cache
def good_record(folder: Path) -> tuple[dict[str, Any], bytes]:
    record = json.loads(leave_run(folder / "run").read_text())
    return record, (folder / "run" / "requests.parquet").read_bytes()


def read_run(folder: Path) -> pd.DataFrame:
    of_these_weights(read_record(folder / "run.json"))
    adopt(ResultsFolder(folder), folder, ())
    return run_frame([folder])


@fuzzed(50)
@given(data=st.data())
def test_run_records_and_their_request_tables(folder: Path, data: st.DataObject) -> None:
    record, table = good_record(folder)
    if data.draw(st.booleans()):
        content = dumped(data.draw(mutated(record)))
        if not data.draw(st.integers(0, 4)):
            content = data.draw(damaged(content))
    else:
        table = data.draw(odd_requests(table))
        record = {key: value for key, value in record.items() if key != "requests_sha256"}
        sha256 = hashlib.sha256(table).hexdigest()
        content = dumped(record | data.draw(st.sampled_from([{}, {"requests_sha256": sha256}])))
    (folder / "run" / "run.json").write_bytes(content)
    (folder / "run" / "requests.parquet").write_bytes(table)
    frame = read_or_refused(lambda: read_run(folder / "run"), UserError)
    if frame is not None:
        (row,) = frame.to_dict("records")
        assert 0 <= row["tpot_s"] < math.inf or math.isnan(row["tpot_s"])
        assert row["mode"] in ("measured", "emulated", "simulated")
        assert row["requests"] > 0


@st.composite
def odd_requests(draw: st.DrawFn, good: bytes) -> bytes:
    columns = pq.read_table(pa.BufferReader(good)).to_pydict()
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(list(columns)))
        columns[name][draw(st.integers(0, 2))] = draw(odd)
        if not draw(st.integers(0, 3)):
            del columns[name]
    content = foreign_parquet(columns)
    return draw(damaged(content)) if draw(st.booleans()) else content


@fuzzed(2)
@given(data=st.data())
def test_results_folders(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    results = Results(tmp_path_factory.mktemp("results"))
    results.experiment("10", results.run("finemoe"), results.run("promoe", tpot=(0.3, 0.4, 0.5)))
    results.analysis("16a", capacity=pd.DataFrame({"capacity": [1], "model": ["a"]}))
    path = data.draw(st.sampled_from(sorted(results.root.rglob("*.*"))))
    if path.suffix == ".json" and data.draw(st.integers(0, 4)):
        path.write_bytes(dumped(data.draw(mutated(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_or_refused(lambda: write(results.folder), UserError)
