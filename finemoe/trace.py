"""Routing traces: what a model routed, request by request, and the files that hold it.

A file is Parquet, with one row group per request: docs/trace-format.md.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import StrictInt

from finemoe.files import atomic_write, cause_of
from finemoe.offload.policy import FloatArray, GateWeights, ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.options import Count, Whole, schema

Content = Literal["logits", "embeddings", "hidden_states"]
DType = Literal["bfloat16", "float16", "float32"]

FORMAT = "finemoe-routing-trace"
VERSION = 1
HEADER_KEY = FORMAT.encode()
CHECKSUM_KEY = b"sha256"
ALWAYS_READ = 2**26  # up to this many unpacked bytes nobody asks how small they are stored
LARGEST_RATIO = 1000
"""Of unpacked to stored bytes. Routing packs into a third to a fiftieth, zeros into a 60,000th."""
LARGEST_COUNT = np.iinfo(np.uint16).max
CONTENTS: tuple[Content, ...] = get_args(Content)
STORED: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
UNREADABLE = (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError, RecursionError)
"""What pyarrow, numpy and json raise for a bad file."""

Packed = tuple[DType, str]  # a dtype, and values of it as base64
FIELDS = schema(  # of a header, beside format and version
    "forbid",
    shape=schema("forbid", layers=Count, experts=Count, top_k=Count, hidden_size=Whole),
    dtype=DType,
    contents=tuple[Content, ...],
    provenance=dict[str, Any],
    gates=schema(
        "forbid",
        weight=Packed,
        **dict.fromkeys(("bias", "correction"), (Packed | None, None)),
        groups=(tuple[Count, Count], (1, 1)),
    )
    | None,
    requests=list[tuple[StrictInt, Count, StrictInt]],
)


class TraceError(ValueError):
    """A trace is corrupt, truncated, of another version or model, or lacks what is asked of it."""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says about itself."""

    shape: ModelShape
    dtype: DType  # of optional arrays, which are stored as the model computed them
    contents: tuple[Content, ...]  # which optional arrays every step holds
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model, weights, dataset, seed, versions: whatever says where the routing came from."""
    gates: GateWeights | None = None  # for systems that apply them to hidden states


@dataclass(frozen=True)
class TracedRequest:
    """One request: its tokens and what it routed; `steps[0]` is the prefill."""

    number: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    steps: tuple[RoutedStep, ...]


class Trace:
    """Requests by number, whatever file they lie in, read one at a time; `len` is how many.

    Use as a context manager. Whatever is wrong with the file raises TraceError, when it is opened
    or when its request is read.
    """

    def __init__(self, path: Path, header: TraceHeader, rows: Mapping[int, Any]) -> None:
        self.path, self.header, self._rows = path, header, rows
        """What each request is read from: here, a function that reads it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the requests, in the order of the file, ascending if it has no order."""
        return tuple(self._rows)

    def requests(self) -> Iterator[TracedRequest]:
        """Yield the requests in the order of `numbers`."""
        return map(self.request, self.numbers)

    def request(self, number: int) -> TracedRequest:
        """Return one request; its arrays may be views of one buffer each, not to be written to."""
        read: Callable[[], TracedRequest] = self._row(number)
        return read()

    def prompt(self, number: int) -> tuple[int, ...]:
        """Return one request's prompt, and read no more; empty if the trace does not say it."""
        self._row(number)
        return ()

    def _row(self, number: int) -> Any:
        if number not in self._rows:
            raise self._error(f"has no request {number}, only {len(self)} others")
        return self._rows[number]

    def _error(self, what: str) -> TraceError:
        return TraceError(f"{self.path}: {what}")

    def require(
        self, contents: Sequence[Content] = (), gates: bool = False, shape: ModelShape | None = None
    ) -> None:
        """Raise TraceError if this trace lacks what is asked, or its L, J and K are others."""
        header = self.header
        own, due = (
            f"{one.layers} layers, {one.experts} experts, top {one.top_k}"
            for one in (header.shape, shape or header.shape)
        )
        if own != due:
            raise self._error(
                f"is of a model of {own}, not {due}; record one of the model that runs"
            )
        missing: list[str] = [name for name in contents if name not in header.contents]
        missing += ["gates"] if gates and header.gates is None else []
        if missing:
            names = ", ".join(missing).replace("_", " ")
            remedy = "record them too (of gates, linear ones and DeepSeek-V3's can be)"
            raise self._error(f"holds no {names}, which this run needs; {remedy}")


# Values in a file -------------------------------------------------------------------------------


def columns_of(contents: Sequence[Content]) -> pa.Schema:
    """Return the columns of a trace that holds these optional arrays."""
    numbers = [("request", pa.int64()), ("step", pa.int32()), ("tokens", pa.int32())]
    arrays = ["counts", *(name for name in CONTENTS if name in contents), "prompt", "output"]
    fields = [*numbers, *((name, pa.binary()) for name in arrays)]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def check_size(rows_bytes: int, stored_bytes: int) -> None:
    """Raise ValueError for a few bytes that would fill memory, which no routing packs into."""
    if rows_bytes > max(ALWAYS_READ, LARGEST_RATIO * stored_bytes):
        raise ValueError(f"{stored_bytes:,} bytes that unpack to {rows_bytes:,}")


def encode(values: FloatArray, dtype: DType) -> bytes:
    """Return float32 values as a model of `dtype` computed them; ValueError if they are finer."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "bfloat16":
        stored = (values.view(np.uint32) >> 16).astype(STORED[dtype])
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(STORED[dtype])
    back = decode(stored.reshape(-1).view(np.uint8), dtype)
    if not np.array_equal(back, values.reshape(-1), equal_nan=True):
        raise ValueError(f"values that are no {dtype}; write the trace with dtype float32")
    return stored.tobytes()


def decode(data: NDArray[np.uint8], dtype: DType) -> FloatArray:
    """Return stored bytes as float32; of float32 a view."""
    stored = data.view(STORED[dtype])
    if dtype != "bfloat16":
        return stored.astype(np.float32, copy=False)
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def fingerprint(table: pa.Table) -> int:
    """Return the CRC-32 of a row group's numbers, lengths and bytes, column by column."""
    crc = 0
    for column in table.schema:
        if pa.types.is_binary(column.type):
            lengths, data = _binary(table, column.name)
            crc = zlib.crc32(data.data, zlib.crc32(lengths.astype("<i8").tobytes(), crc))
        else:
            crc = zlib.crc32(table[column.name].to_numpy().astype("<i8").tobytes(), crc)
    return crc


def _binary(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the lengths and the joined bytes of a column."""
    array = table[name].cast(pa.large_binary()).combine_chunks()
    _, ends, data = array.buffers()
    offsets = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1]
    joined = np.frombuffer(data or b"", np.uint8)
    return np.diff(offsets), joined[offsets[0] : offsets[-1]]


def _check_finite(name: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name} hold values that are NaN or infinite")


def _check_counts(
    counts: NDArray[np.integer], tokens: NDArray[np.integer], header: TraceHeader
) -> None:
    """Raise ValueError if counts (steps, L, J) are not those of K experts for each token."""
    due = tokens.astype(np.int64)[:, None] * header.shape.top_k
    sums = counts.sum(axis=2, dtype=np.int64)
    # Foreign traces say no tokens: theirs are the fullest layer's rows over K, rounded up.
    least = 1 if "foreign" in header.provenance else due
    if (sums < least).any() or (sums > due).any():
        raise ValueError("counts do not add up to K experts for each of the tokens")


def array_shape(name: Content, tokens: int, shape: ModelShape) -> tuple[int, ...]:
    """Return the shape of an optional array of a step of `tokens` tokens."""
    return {
        "logits": (shape.layers, tokens, shape.experts),
        "embeddings": (tokens, shape.hidden_size),
        "hidden_states": (shape.layers, tokens, shape.hidden_size),
    }[name]


# Header -----------------------------------------------------------------------------------------


def _pack_header(
    header: TraceHeader, requests: Mapping[int, tuple[int, int]]
) -> dict[bytes, bytes]:
    """Return the metadata of a trace of these requests: number to steps and CRC-32."""
    gates = header.gates
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "shape": asdict(header.shape),
        "dtype": header.dtype,
        "contents": list(header.contents),
        "provenance": dict(header.provenance),
        "gates": gates
        and {
            **{name: _to_text(getattr(gates, name)) for name in ("weight", "bias", "correction")},
            "groups": gates.groups,
        },
        "requests": [[number, *entry] for number, entry in requests.items()],
    }
    packed = json.dumps(fields, allow_nan=False).encode()
    return {HEADER_KEY: packed, CHECKSUM_KEY: hashlib.sha256(packed).hexdigest().encode()}


def _unpack_header(metadata: Mapping[bytes, bytes]) -> tuple[TraceHeader, list[tuple[int, ...]]]:
    """Return header and `[number, steps, crc32]` of each row group; TraceError or ValueError."""
    if HEADER_KEY not in metadata:
        raise TraceError("has no trace header; give a trace that record=true has written")
    packed = metadata[HEADER_KEY]
    if metadata.get(CHECKSUM_KEY) != hashlib.sha256(packed).hexdigest().encode():
        raise TraceError("is damaged in its header; copy or record it again")
    fields = json.loads(packed)
    form, version = fields.pop("format"), fields.pop("version")
    if (form, version) != (FORMAT, VERSION):
        raise TraceError(
            f"is a {form!r} of version {version!r}, this release reads a {FORMAT!r} of version "
            f"{VERSION}; record it again"
        )
    told = FIELDS(**fields)
    shape = ModelShape(**dict(told.shape))
    if shape.top_k > shape.experts:
        raise ValueError(f"top {shape.top_k} of {shape.experts} experts")
    gates = told.gates and _gate_weights(shape, **dict(told.gates))
    return TraceHeader(shape, told.dtype, told.contents, told.provenance, gates), told.requests


def _gate_weights(
    shape: ModelShape, weight: Packed, groups: tuple[int, int], **added: Packed | None
) -> GateWeights:
    rows = (shape.layers, shape.experts)
    read = {name: one and _from_text(one).reshape(rows) for name, one in added.items()}
    return GateWeights(_from_text(weight).reshape(*rows, shape.hidden_size), **read, groups=groups)


def _to_text(values: FloatArray | None) -> Packed | None:
    """Return values in the narrowest exact dtype."""
    if values is None:
        return None
    for dtype in get_args(DType):
        with suppress(ValueError):
            return dtype, base64.b64encode(encode(values, dtype)).decode()
    return None


def _from_text(packed: Packed) -> FloatArray:
    dtype, text = packed
    values = decode(np.frombuffer(base64.b64decode(text, validate=True), np.uint8), dtype)
    _check_finite("gates", values)
    return values


# Writing ----------------------------------------------------------------------------------------


@contextmanager
def trace_writer(path: Path, header: TraceHeader) -> Iterator[Callable[[TracedRequest], None]]:
    """Yield a function that appends a request; arrays that the header does not list are left out.

    The file appears under its name when the block ends without an exception, else nothing is left.
    Raises TraceError for a header that is no JSON, a request that was written before, and an array
    that is missing, misshapen or finer than the header's dtype.
    """
    requests: dict[int, tuple[int, int]] = {}
    try:
        _pack_header(header, requests)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path}: the header is no JSON: {error}; use plain values") from error
    columns = columns_of(header.contents)

    def write(request: TracedRequest) -> None:
        try:
            if request.number in requests:
                raise ValueError("it was written before")
            table = pa.table(_columns(request, header), schema=columns)
        except (ValueError, OverflowError) as error:
            raise TraceError(f"{path}: request {request.number}: {error}") from error
        file.write_table(table, row_group_size=len(table))
        requests[request.number] = len(table), fingerprint(table)

    options = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    with (
        atomic_write(path) as partial,
        pq.ParquetWriter(
            partial, columns, compression="zstd", write_page_checksum=True, **options
        ) as file,
    ):
        yield write
        file.add_key_value_metadata(_pack_header(header, requests))


def _columns(request: TracedRequest, header: TraceHeader) -> dict[str, Any]:
    steps = request.steps
    if not steps or min(step.tokens for step in steps) < 1:
        raise ValueError("it has no steps, or steps without tokens")
    later = [b""] * (len(steps) - 1)
    columns: dict[str, Any] = {
        "request": [request.number] * len(steps),
        "step": range(len(steps)),
        "tokens": [step.tokens for step in steps],
        "counts": [_count_bytes(step, header) for step in steps],
        "prompt": [np.array(request.prompt, "<i4").tobytes(), *later],
        "output": [np.array(request.output, "<i4").tobytes(), *later],
    }
    for name in header.contents:
        columns[name] = [_array_bytes(name, step, header) for step in steps]
    return columns


def _count_bytes(step: RoutedStep, header: TraceHeader) -> bytes:
    shape = (header.shape.layers, header.shape.experts)
    if step.counts.shape != shape:
        raise ValueError(f"counts have the shape {step.counts.shape}, not {shape}")
    if step.counts.min() < 0 or step.counts.max() > LARGEST_COUNT:
        raise ValueError(f"counts are not all in 0..{LARGEST_COUNT}; split the prefill")
    _check_counts(step.counts[None], np.array([step.tokens]), header)
    return step.counts.astype("<u2").tobytes()


def _array_bytes(name: Content, step: RoutedStep, header: TraceHeader) -> bytes:
    values: FloatArray | None = getattr(step, name)
    shape = array_shape(name, step.tokens, header.shape)
    if values is None or values.shape != shape:
        actual = "missing" if values is None else f"of shape {values.shape}"
        raise ValueError(f"{name} are {actual}, not of shape {shape}")
    _check_finite(name, values)
    try:
        return encode(values, header.dtype)
    except ValueError as error:
        raise ValueError(f"{name} hold {error}") from error


# Reading ----------------------------------------------------------------------------------------


@contextmanager
def reading(
    path: Path,
    part: str = "",
    fault: str = "is damaged or no trace",
    remedy: str = "copy or record it again",
) -> Iterator[None]:
    """Turn whatever a bad file makes pyarrow, numpy, json or pydantic raise into one line."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {part}{error}") from None
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
        raise TraceError(f"{path}: {part}{fault}: {cause_of(error)}; {remedy}") from error


class TraceReader(Trace):
    """Reads a trace file, one row group per request."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with reading(self.path):
            # Streamed, not mapped: of a file that shrinks meanwhile, a map would kill the process.
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            self.header, groups = _unpack_header(self._file.metadata.metadata or {})
            self._rows = {entry[0]: (group, *entry[1:]) for group, entry in enumerate(groups)}
            # Older releases of pyarrow read the file's key-value pairs into the schema as well.
            columns = self._file.schema_arrow.remove_metadata()
            due = columns_of(self.header.contents)
            if not columns.equals(due):
                raise TraceError(f"has the columns {columns.names}, not {due.names}; record again")
            if not self._file.num_row_groups == len(groups) == len(self):
                raise ValueError(f"{self._file.num_row_groups} row groups for {len(self)} requests")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def request(self, number: int) -> TracedRequest:
        _, steps, crc32 = self._row(number)
        with reading(self.path, f"request {number} "):
            table = self._row_group(number)
            if len(table) != steps or fingerprint(table) != crc32:
                raise ValueError("content that its checksum does not match")
            due = {"request": number, "step": np.arange(steps)}
            if any((table[name].to_numpy() != values).any() for name, values in due.items()):
                raise ValueError("rows of another request, or steps out of order")
            prompt, output = (_tokens(table, name) for name in ("prompt", "output"))
            return TracedRequest(number, prompt, output, self._steps(table))

    def prompt(self, number: int) -> tuple[int, ...]:
        self._row(number)
        with reading(self.path, f"request {number} "):
            return _tokens(self._row_group(number, ["prompt"]), "prompt")

    def _row_group(self, number: int, only: list[str] | None = None) -> pa.Table:
        """Return a request's columns; ValueError if it is not as announced or would fill memory."""
        group, steps, _ = self._rows[number]
        # Checked before anything of that size is allocated.
        stored = self._file.metadata.row_group(group)
        if stored.num_rows != steps:
            raise ValueError("another number of steps than the header says")
        columns = map(stored.column, range(stored.num_columns))
        check_size(stored.total_byte_size, sum(column.total_compressed_size for column in columns))
        return self._file.read_row_group(group, only, use_threads=False)

    def _steps(self, table: pa.Table) -> tuple[RoutedStep, ...]:
        tokens = table["tokens"].to_numpy()
        layers, experts = self.header.shape.layers, self.header.shape.experts
        lengths, data = _binary(table, "counts")
        if (tokens < 1).any() or (lengths != layers * experts * 2).any():
            raise ValueError("counts of a size that does not fit its tokens and shape")
        counts = data.view("<u2").reshape(-1, layers, experts)
        _check_counts(counts, tokens, self.header)
        arrays = (self._arrays(table, name, tokens.tolist()) for name in CONTENTS)
        return tuple(map(RoutedStep, tokens.tolist(), counts, *arrays))

    def _arrays(
        self, table: pa.Table, name: Content, tokens: Sequence[int]
    ) -> Sequence[FloatArray | None]:
        """Return an optional array of every step, decoded all at once."""
        if name not in self.header.contents:
            return [None] * len(tokens)
        dtype = self.header.dtype
        lengths, data = _binary(table, name)
        shapes = [array_shape(name, n, self.header.shape) for n in tokens]
        sizes = [math.prod(shape) for shape in shapes]
        if [size * STORED[dtype].itemsize for size in sizes] != lengths.tolist():
            raise ValueError(f"{name} of a size that does not fit its tokens and shape")
        values = decode(data, dtype)
        _check_finite(name, values)
        parts = np.split(values, np.cumsum(sizes[:-1]))
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _tokens(table: pa.Table, name: str) -> tuple[int, ...]:
    lengths, data = _binary(table, name)
    ids = data.view("<i4")
    if lengths[1:].any() or (ids < 0).any():
        raise ValueError(f"a {name} in a later step than the first, or with a token id below 0")
    return tuple(ids.tolist())
