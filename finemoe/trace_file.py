"""Routing traces on disk: one Parquet file, one row group a request (docs/trace-format.md)."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finemoe.files import atomic_write
from finemoe.offload.policy import FloatArray, GateWeights, ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.trace import (
    FORMAT,
    VERSION,
    Content,
    DType,
    Trace,
    TracedRequest,
    TraceError,
    TraceHeader,
)

HEADER_KEY = FORMAT.encode()
CHECKSUM_KEY = b"sha256"
ALWAYS_READ = 2**26
"""Up to this many unpacked bytes nobody asks how small they are stored."""
LARGEST_RATIO = 1000
"""Of unpacked to stored bytes. Routing packs into a third to a fiftieth, zeros into a 60,000th."""
LARGEST_COUNT = np.iinfo(np.uint16).max
CONTENTS: tuple[Content, ...] = get_args(Content)
STORED: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}

UNREADABLE = (
    pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError, RecursionError,
)  # fmt: skip
"""What pyarrow, numpy and json raise for a bad file."""

Bytes = NDArray[np.uint8]


def schema(contents: Sequence[Content]) -> pa.Schema:
    """Return the columns of a trace that holds these optional arrays."""
    numbers = [("request", pa.int64()), ("step", pa.int32()), ("tokens", pa.int32())]
    arrays = ["counts", *(name for name in CONTENTS if name in contents), "prompt", "output"]
    fields = [*numbers, *((name, pa.binary()) for name in arrays)]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


@dataclass(frozen=True)
class IndexEntry:
    """What the header says about one row group."""

    number: int
    """Number of the request."""
    steps: int
    crc32: int
    """Over what the row group holds, in the order of the columns."""


# Values -----------------------------------------------------------------------------------------


def finite(name: str, values: FloatArray) -> FloatArray:
    """Return the values; ValueError if one of them is NaN or infinite."""
    if not np.isfinite(values).all():
        raise ValueError(f"{name} hold values that are NaN or infinite")
    return values


def check_size(rows_bytes: int, stored_bytes: int) -> None:
    """Raise ValueError for a few bytes that would fill memory, which no routing packs into."""
    if rows_bytes > max(ALWAYS_READ, LARGEST_RATIO * stored_bytes):
        raise ValueError(f"{stored_bytes:,} bytes that unpack to {rows_bytes:,}")


def encode(values: FloatArray, dtype: DType) -> bytes:
    """Return float32 values as a model of `dtype` computed them; ValueError if they are finer."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        exact = not (bits & 0xFFFF).any()
        stored = (bits >> 16).astype(STORED[dtype])
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(STORED[dtype])
        exact = np.array_equal(stored.astype(np.float32), values, equal_nan=True)
    if not exact:
        raise ValueError(f"values that are no {dtype}; write the trace with dtype float32")
    return stored.tobytes()


def decode(data: Bytes, dtype: DType) -> FloatArray:
    """Return stored bytes as float32; of float32 a view."""
    stored = data.view(STORED[dtype])
    if dtype != "bfloat16":
        return stored.astype(np.float32, copy=False)
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _column(table: pa.Table, name: str) -> tuple[NDArray[np.int64], Bytes]:
    """Return the lengths and the joined bytes of a binary column, uncopied if in one chunk."""
    lengths, parts = [], []
    for chunk in table[name].chunks:
        _, ends, data = chunk.buffers()
        offsets = np.frombuffer(ends, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        whole = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        lengths.append(np.diff(offsets).astype(np.int64))
        parts.append(whole[offsets[0] : offsets[-1]])
    if len(parts) == 1:
        return lengths[0], parts[0]
    return np.concatenate(lengths), np.concatenate(parts)


def fingerprint(table: pa.Table) -> int:
    """Return the CRC-32 of a row group's numbers, lengths and bytes, column by column."""
    crc = 0
    for field in table.schema:
        if pa.types.is_binary(field.type):
            lengths, data = _column(table, field.name)
            crc = zlib.crc32(data.data, zlib.crc32(lengths.astype("<i8").tobytes(), crc))
        else:
            crc = zlib.crc32(table[field.name].to_numpy().astype("<i8").tobytes(), crc)
    return crc


# Header -----------------------------------------------------------------------------------------


def _pack_header(header: TraceHeader, index: Sequence[IndexEntry]) -> dict[bytes, bytes]:
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "shape": asdict(header.shape),
        "dtype": header.dtype,
        "contents": list(header.contents),
        "provenance": dict(header.provenance),
        "gates": None if header.gates is None else _pack_gates(header.gates),
        "requests": [[entry.number, entry.steps, entry.crc32] for entry in index],
    }
    packed = json.dumps(fields, allow_nan=False).encode()
    return {HEADER_KEY: packed, CHECKSUM_KEY: hashlib.sha256(packed).hexdigest().encode()}


def _unpack_header(metadata: Mapping[bytes, bytes]) -> tuple[TraceHeader, tuple[IndexEntry, ...]]:
    """Return header and index; TraceError with the cause, KeyError or ValueError if malformed."""
    if HEADER_KEY not in metadata:
        raise TraceError("has no trace header; give a trace that record=true has written")
    packed = metadata[HEADER_KEY]
    if metadata.get(CHECKSUM_KEY, b"").decode() != hashlib.sha256(packed).hexdigest():
        raise TraceError("is damaged in its header; copy or record it again")
    fields = json.loads(packed)
    if fields["format"] != FORMAT:
        raise TraceError(f"has the format {fields['format']!r}, not {FORMAT!r}; record it again")
    if fields["version"] != VERSION:
        raise TraceError(
            f"has version {fields['version']} of the format, this release reads version {VERSION}; "
            "record it again"
        )
    shape = _unpack_shape(fields["shape"])
    gates = fields["gates"] and _unpack_gates(fields["gates"], shape)
    contents = tuple(fields["contents"])
    if fields["dtype"] not in STORED or not set(contents) <= set(CONTENTS):
        raise ValueError(f"unknown dtype or contents: {fields['dtype']}, {contents}")
    header = TraceHeader(shape, fields["dtype"], contents, dict(fields["provenance"]), gates)
    return header, tuple(map(_unpack_entry, fields["requests"]))


def _unpack_shape(fields: Mapping[str, Any]) -> ModelShape:
    layers, experts, top_k = (_at_least(1, fields[name]) for name in ("layers", "experts", "top_k"))
    if top_k > experts:
        raise ValueError(f"top {top_k} of {experts} experts")
    return ModelShape(layers, experts, top_k, _at_least(0, fields["hidden_size"]))


def _unpack_entry(fields: Sequence[Any]) -> IndexEntry:
    number, steps, crc32 = fields
    if type(number) is not int or type(crc32) is not int:
        raise ValueError("requests that are not numbers")
    return IndexEntry(number, _at_least(1, steps), crc32)


def _at_least(least: int, value: Any) -> int:
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(f"{value!r} where an integer from {least} up is due")
    return value


def _pack_gates(gates: GateWeights) -> dict[str, Any]:
    bias = None if gates.bias is None else _to_text(gates.bias)
    return {"weight": _to_text(gates.weight), "bias": bias}


def _unpack_gates(fields: Mapping[str, Any], shape: ModelShape) -> GateWeights:
    rows = (shape.layers, shape.experts)
    weight = _from_text(fields["weight"]).reshape(*rows, shape.hidden_size)
    return GateWeights(weight, fields["bias"] and _from_text(fields["bias"]).reshape(rows))


def _to_text(values: FloatArray) -> list[str]:
    """Return the narrowest exact dtype and the values in it as base64."""
    for dtype in ("bfloat16", "float16"):
        try:
            return [dtype, base64.b64encode(encode(values, dtype)).decode()]
        except ValueError:
            continue
    return ["float32", base64.b64encode(encode(values, "float32")).decode()]


def _from_text(text: Sequence[Any]) -> FloatArray:
    dtype, data = text
    packed = np.frombuffer(base64.b64decode(data, validate=True), np.uint8)
    return finite("gates", decode(packed, dtype))


# Writing ----------------------------------------------------------------------------------------


class TraceWriter:
    """Writes a trace request by request; use as a context manager.

    The file appears under its name when the block ends without an exception, else nothing is left.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Raises TraceError if the header cannot be stored."""
        self.path = Path(path)
        self.header = header
        self._schema = schema(header.contents)
        self._index: list[IndexEntry] = []
        self._writer: pq.ParquetWriter | None = None
        try:
            _pack_header(header, ())
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path}: the header is no JSON: {error}; use plain values") from error

    def __enter__(self) -> TraceWriter:
        with ExitStack() as stack:
            writer = pq.ParquetWriter(
                stack.enter_context(atomic_write(self.path)),
                self._schema,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,
            )
            self._writer = stack.enter_context(writer)
            self._open = stack.pop_all()
        return self

    def write(self, request: TracedRequest) -> None:
        """Append a request; arrays that the header does not list are left out.

        Raises TraceError if its number was written before, or if an array is missing, misshapen
        or finer than the header's dtype.
        """
        assert self._writer is not None
        try:
            if any(entry.number == request.number for entry in self._index):
                raise ValueError("it was written before")
            table = pa.table(self._columns(request), schema=self._schema)
        except (ValueError, OverflowError) as error:
            raise TraceError(f"{self.path}: request {request.number}: {error}") from error
        self._writer.write_table(table, row_group_size=len(request.steps))
        self._index.append(IndexEntry(request.number, len(request.steps), fingerprint(table)))

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        assert self._writer is not None
        if kind is None:
            self._open.callback(
                self._writer.add_key_value_metadata, _pack_header(self.header, self._index)
            )
        self._open.__exit__(kind, *error)

    def _columns(self, request: TracedRequest) -> dict[str, Any]:
        steps = request.steps
        if not steps:
            raise ValueError("it has no steps")
        later = [b""] * (len(steps) - 1)
        columns: dict[str, Any] = {
            "request": [request.number] * len(steps),
            "step": range(len(steps)),
            "tokens": [_at_least(1, step.tokens) for step in steps],
            "counts": [self._counts(step) for step in steps],
            "prompt": [np.array(request.prompt, "<i4").tobytes(), *later],
            "output": [np.array(request.output, "<i4").tobytes(), *later],
        }
        for name in self.header.contents:
            columns[name] = [self._array(name, step) for step in steps]
        return columns

    def _counts(self, step: RoutedStep) -> bytes:
        shape = (self.header.shape.layers, self.header.shape.experts)
        if step.counts.shape != shape:
            raise ValueError(f"counts have the shape {step.counts.shape}, not {shape}")
        if step.counts.min() < 0 or step.counts.max() > LARGEST_COUNT:
            raise ValueError(f"counts are not all in 0..{LARGEST_COUNT}; split the prefill")
        _check_counts(step.counts[None], np.array([step.tokens]), self.header)
        return step.counts.astype("<u2").tobytes()

    def _array(self, name: Content, step: RoutedStep) -> bytes:
        values: FloatArray | None = getattr(step, name)
        shape = array_shape(name, step.tokens, self.header.shape)
        if values is None or values.shape != shape:
            found = "missing" if values is None else f"of shape {values.shape}"
            raise ValueError(f"{name} are {found}, not of shape {shape}")
        finite(name, values)
        try:
            return encode(values, self.header.dtype)
        except ValueError as error:
            raise ValueError(f"{name} hold {error}") from error


def _check_counts(
    counts: NDArray[np.integer], tokens: NDArray[np.integer], header: TraceHeader
) -> None:
    """Raise ValueError if counts (steps, L, J) are not those of K experts for each token."""
    due = tokens.astype(np.int64)[:, None] * header.shape.top_k
    found = counts.sum(axis=2, dtype=np.int64)
    # Foreign traces say no tokens: theirs are the fullest layer's rows over K, rounded up.
    least = 1 if "foreign" in header.provenance else due
    if (found < least).any() or (found > due).any():
        raise ValueError("counts do not add up to K experts for each of the tokens")


def array_shape(name: Content, tokens: int, shape: ModelShape) -> tuple[int, ...]:
    """Return the shape of an optional array of a step of `tokens` tokens."""
    return {
        "logits": (shape.layers, tokens, shape.experts),
        "embeddings": (tokens, shape.hidden_size),
        "hidden_states": (shape.layers, tokens, shape.hidden_size),
    }[name]


# Reading ----------------------------------------------------------------------------------------


@contextmanager
def reading(
    path: Path,
    part: str = "",
    fault: str = "is damaged or no trace",
    remedy: str = "copy or record it again",
) -> Iterator[None]:
    """Turn whatever a bad file makes pyarrow, numpy or json raise into one line."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {part}{error}") from None
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TraceError(f"{path}: {part}{fault}: {cause}; {remedy}") from error


class TraceReader(Trace):
    """Reads a trace file, one row group a request."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with reading(self.path):
            # Streamed, not mapped: of a file that shrinks meanwhile, a map would kill the process.
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            self.header, self._index = _unpack_header(self._file.metadata.metadata or {})
            self._rows = {entry.number: group for group, entry in enumerate(self._index)}
            self._check_columns()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _request(self, number: int) -> TracedRequest:
        with reading(self.path, f"request {number} "):
            return self._read(self._rows[number])

    def _check_columns(self) -> None:
        # Older releases of pyarrow read the file's key-value pairs into the schema as well.
        found, due = self._file.schema_arrow.remove_metadata(), schema(self.header.contents)
        if not found.equals(due):
            raise TraceError(f"has the columns {found.names}, not {due.names}; record it again")
        if self._file.num_row_groups != len(self._index) or len(self) != len(self._index):
            raise ValueError(f"{self._file.num_row_groups} row groups for {len(self)} requests")

    def _read(self, group: int) -> TracedRequest:
        entry = self._index[group]
        # Checked before anything of that size is allocated.
        stored = self._file.metadata.row_group(group)
        if stored.num_rows != entry.steps:
            raise ValueError("another number of steps than the header says")
        columns = map(stored.column, range(stored.num_columns))
        check_size(stored.total_byte_size, sum(one.total_compressed_size for one in columns))
        table = self._file.read_row_group(group, use_threads=False)
        if len(table) != entry.steps or fingerprint(table) != entry.crc32:
            raise ValueError("content that its checksum does not match")
        if (table["request"].to_numpy() != entry.number).any():
            raise ValueError("rows of another request")
        if (table["step"].to_numpy() != np.arange(entry.steps)).any():
            raise ValueError("steps out of order")
        prompt, output = (self._tokens(table, name) for name in ("prompt", "output"))
        return TracedRequest(entry.number, prompt, output, self._steps(table))

    def _tokens(self, table: pa.Table, name: str) -> tuple[int, ...]:
        lengths, data = _column(table, name)
        if lengths[1:].any():
            raise ValueError(f"a {name} in a later step than the first")
        ids = data.view("<i4")
        if (ids < 0).any():
            raise ValueError(f"a {name} with a token id below 0")
        return tuple(ids.tolist())

    def _steps(self, table: pa.Table) -> tuple[RoutedStep, ...]:
        tokens = table["tokens"].to_numpy()
        layers, experts = self.header.shape.layers, self.header.shape.experts
        lengths, data = _column(table, "counts")
        if (tokens < 1).any() or (lengths != layers * experts * 2).any():
            raise ValueError("counts of a size that does not fit its tokens and shape")
        counts = data.view("<u2").reshape(-1, layers, experts)
        _check_counts(counts, tokens, self.header)
        counted = tokens.tolist()
        held = [self._arrays(table, name, counted) for name in CONTENTS]
        return tuple(
            RoutedStep(n, counts[i], *(arrays[i] for arrays in held)) for i, n in enumerate(counted)
        )

    def _arrays(
        self, table: pa.Table, name: Content, tokens: Sequence[int]
    ) -> Sequence[FloatArray | None]:
        """Return an optional array of every step, decoded all at once."""
        if name not in self.header.contents:
            return [None] * len(tokens)
        dtype = self.header.dtype
        lengths, data = _column(table, name)
        shapes = [array_shape(name, n, self.header.shape) for n in tokens]
        sizes = np.array([math.prod(shape) for shape in shapes], dtype=np.int64)
        if (lengths != sizes * STORED[dtype].itemsize).any():
            raise ValueError(f"{name} of a size that does not fit its tokens and shape")
        values = finite(name, decode(data, dtype))
        stops = np.cumsum(sizes).tolist()
        return [
            values[stop - size : stop].reshape(shape)
            for shape, size, stop in zip(shapes, sizes.tolist(), stops, strict=True)
        ]
