"""Routing traces on disk: exact round trips, nothing half-written, no damage that goes unseen."""

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe import trace
from finemoe.offload.policy import FloatArray, GateWeights, ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.trace import (
    CONTENTS,
    TracedRequest,
    TraceError,
    TraceHeader,
    TraceReader,
    trace_writer,
)
from tests.command import ROOT

SHAPE = ModelShape(2, 3, 1, 4)
SIZES = dataclasses.asdict(SHAPE)


def rounded(values: FloatArray, dtype: trace.DType) -> FloatArray:
    if dtype == "bfloat16":
        cut: FloatArray = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return cut
    return values.astype(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def a_step(tokens: int, header: TraceHeader, rng: np.random.Generator) -> RoutedStep:
    arrays: dict[str, Any] = dict.fromkeys(CONTENTS)
    for name in header.contents:
        values = rng.normal(size=trace.array_shape(name, tokens, header.shape)).astype(np.float32)
        arrays[name] = rounded(values, header.dtype)
    shape = header.shape
    even = np.full(shape.experts, 1 / shape.experts)
    counts = rng.multinomial(tokens * shape.top_k, even, shape.layers)
    return RoutedStep(tokens, counts, **arrays)


def a_request(number: int, tokens: list[int], header: TraceHeader) -> TracedRequest:
    rng = np.random.default_rng(number)
    steps = tuple(a_step(n, header, rng) for n in tokens)
    return TracedRequest(number, tuple(range(tokens[0])), (7, 2**31 - 1), steps)


def a_trace(path: Path, requests: int = 2) -> list[TracedRequest]:
    gates = GateWeights(np.arange(24, dtype=np.float32).reshape(2, 3, 4) / np.float32(3))
    header = TraceHeader(SHAPE, "bfloat16", CONTENTS, {"model": "tiny", "seed": 5}, gates)
    return written(path, header, [a_request(n, [3, 1, 1], header) for n in range(requests)])


def written(path: Path, header: TraceHeader, requests: list[TracedRequest]) -> list[TracedRequest]:
    with trace_writer(path, header) as write:
        for request in requests:
            write(request)
    return requests


def assert_same(found: TracedRequest, due: TracedRequest) -> None:
    assert (found.number, found.prompt, found.output) == (due.number, due.prompt, due.output)
    for step, expected in zip(found.steps, due.steps, strict=True):
        assert step.tokens == expected.tokens
        np.testing.assert_array_equal(step.counts, expected.counts)
        for name in CONTENTS:
            values, original = getattr(step, name), getattr(expected, name)
            assert (values is None) == (original is None)
            if values is not None:
                assert values.dtype == np.float32
                np.testing.assert_array_equal(values.view(np.uint32), original.view(np.uint32))


headers = st.builds(
    TraceHeader,
    st.builds(ModelShape, *[st.integers(1, 4)] * 4).filter(lambda one: one.top_k <= one.experts),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.lists(st.sampled_from(CONTENTS), unique=True).map(tuple),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)


@settings(max_examples=20)
@given(headers, st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=3))
def test_round_trips(tmp_path_factory: Any, header: TraceHeader, lengths: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    requests = [a_request(10 - i, tokens, header) for i, tokens in enumerate(lengths)]
    written(path, header, requests)
    with TraceReader(path) as reader:
        assert reader.header == header
        assert len(reader) == len(requests)
        assert reader.numbers == tuple(request.number for request in requests)
        for found, due in zip(reader.requests(), requests, strict=True):
            assert_same(found, due)
        for due in reversed(requests):
            assert_same(reader.request(due.number), due)
            assert reader.prompt(due.number) == due.prompt


@pytest.mark.parametrize("biased", [True, False])
def test_gates_are_read_as_they_were(tmp_path: Path, biased: bool) -> None:
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / np.float32(3)
    gates = GateWeights(weight, weight[:, :, 1] if biased else None)
    written(tmp_path / "t", TraceHeader(SHAPE, "bfloat16", (), {}, gates), [])
    kept: Any = TraceReader(tmp_path / "t").header.gates
    np.testing.assert_array_equal(kept.weight, weight)
    np.testing.assert_equal(kept.bias, gates.bias)


def test_the_documented_way_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    due = a_trace(Path("trace.parquet"))[0].steps[0]
    page = (ROOT / "docs" / "trace-format.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    np.testing.assert_array_equal(names["counts"], due.counts)
    np.testing.assert_array_equal(names["logits"], due.logits)


HEADER = TraceHeader(SHAPE, "float16", ("logits",))
GOOD = a_request(3, [2, 1], HEADER)


def with_step(**change: Any) -> TracedRequest:
    return dataclasses.replace(GOOD, steps=(dataclasses.replace(GOOD.steps[0], **change),))


BAD = {
    "no steps": dataclasses.replace(GOOD, steps=()),
    r"of shape \(2, 2, 4\), not of shape": with_step(logits=np.zeros((2, 2, 4), np.float32)),
    "logits hold .* NaN": with_step(logits=np.full((2, 2, 3), np.nan, np.float32)),
    "counts do not add up to K experts for each": with_step(counts=np.ones((2, 3), int)),
    "": dataclasses.replace(GOOD, prompt=(2**31,)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(TraceError, match=f"request 3: .*{message}"):
        written(tmp_path / "t", HEADER, [BAD[message]])


def test_what_no_trace_can_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="request 3: it was written before"):
        written(tmp_path / "t", HEADER, [GOOD, GOOD])
    with pytest.raises(TraceError, match="no JSON"):
        written(tmp_path / "t", TraceHeader(SHAPE, "float32", (), {"path": tmp_path}), [])
    with pytest.raises(ValueError, match="no bfloat16"):
        trace.encode(np.array([1 + 2**-8], np.float32), "bfloat16")


def read_all(path: Path) -> list[TracedRequest]:
    with TraceReader(path) as reader:
        return list(reader.requests())


def rewrite(
    path: Path,
    groups: tuple[int, ...] = (0, 1),
    cell: tuple[str, int, bytes] | None = None,
    **fields: Any,
) -> None:
    """Write these row groups again, soundly, with a cell or fields of the header changed."""
    with pq.ParquetFile(path) as file:
        tables = [file.read_row_group(group) for group in groups]
        header = json.loads(file.metadata.metadata[trace.HEADER_KEY])
    if cell is not None:
        name, index, value = cell
        values = tables[0][name].to_pylist()
        values[index] = value
        column, field = tables[0].column_names.index(name), tables[0].schema.field(name)
        tables[0] = tables[0].set_column(column, field, [pa.array(values, pa.binary())])
        fields["requests"] = [[n, 3, trace.fingerprint(table)] for n, table in enumerate(tables)]
    packed = json.dumps({**header, **fields}).encode()
    checksum = hashlib.sha256(packed).hexdigest().encode()
    schema = tables[0].schema.remove_metadata()
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        names = trace.HEADER_KEY, trace.CHECKSUM_KEY
        writer.add_key_value_metadata(dict(zip(names, (packed, checksum), strict=True)))
        for table in tables:
            writer.write_table(table.replace_schema_metadata(None))


def test_row_groups_are_read_in_their_own_order_only(tmp_path: Path) -> None:
    due = a_trace(tmp_path / "t")
    rewrite(tmp_path / "t")
    assert_same(read_all(tmp_path / "t")[1], due[1])
    rewrite(tmp_path / "t", groups=(1, 0))
    with pytest.raises(TraceError, match=r"request 0 .*checksum"):
        read_all(tmp_path / "t")


def test_no_damaged_byte_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "t"
    requests, good = a_trace(path), (tmp_path / "t").read_bytes()
    for place in range(0, len(good), 41):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        with suppress(TraceError):
            for found, due in zip(read_all(path), requests, strict=True):
                assert_same(found, due)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "of version 2, this release reads .* of version 1; record it"),
        ({"shape": {**SIZES, "layers": 0}}, "'shape.layers': Input should be greater"),
        ({"gates": {"weight": ["float32", "AADAfwAA" * 16], "bias": None}}, "gates hold .* NaN"),
        ({"requests": [[0, 3, 0]]}, "2 row groups for 1 requests"),
        ({"requests": [[0, 3, 0], [1, 3, 0]]}, "request 0 .*checksum"),
    ],
)
def test_unfit_headers_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    a_trace(tmp_path / "t")
    rewrite(tmp_path / "t", **fields)
    with pytest.raises(TraceError, match=message):
        read_all(tmp_path / "t")


ODD_PROMPTS = {"a prompt .* with a token id below 0": b"\xff" * 12, "unpack to 134,2": bytes(2**27)}


@pytest.mark.parametrize("message", ODD_PROMPTS)
def test_prompts_that_no_model_has_are_refused(tmp_path: Path, message: str) -> None:
    a_trace(tmp_path / "t")
    rewrite(tmp_path / "t", cell=("prompt", 0, ODD_PROMPTS[message]))
    with TraceReader(tmp_path / "t") as reader:
        for read in (reader.request, reader.prompt):
            with pytest.raises(TraceError, match=message):
                read(0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nowhere: no such file; check the path"):
        TraceReader(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="damaged or no trace"):
        TraceReader(tmp_path)


def test_what_a_system_needs(tmp_path: Path) -> None:
    written(tmp_path / "t", HEADER, [GOOD])
    reader = TraceReader(tmp_path / "t")
    reader.require(["logits"], shape=dataclasses.replace(SHAPE, hidden_size=9))
    with pytest.raises(TraceError, match="t: holds no hidden states, gates, which this run needs"):
        reader.require(["logits", "hidden_states"], gates=True)
    with pytest.raises(TraceError, match="of 2 layers, 3 experts, top 1, not 2 layers, 4 experts"):
        reader.require(shape=dataclasses.replace(SHAPE, experts=4))
    for read in (reader.request, reader.prompt):
        with pytest.raises(TraceError, match="has no request 4, only 1 others"):
            read(4)
