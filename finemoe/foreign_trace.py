"""Traces of other projects: a CSV or Parquet file with one row an expert that a token chose.

The columns are `request, phase, step, layer, rank, expert, weight`; further ones are ignored. Which
token a row belongs to is not said, and neither are logits, embeddings or hidden states.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finemoe.offload.policy import ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.trace import Trace, TracedRequest, TraceError, TraceHeader
from finemoe.trace_file import UNREADABLE, check_size, reading

COLUMNS = pa.schema(
    {
        "request": pa.int64(),
        "phase": pa.string(),
        "step": pa.int64(),
        "layer": pa.int32(),
        "rank": pa.int32(),
        "expert": pa.int32(),
        "weight": pa.float64(),
    }
)

ROW_BYTES = 50
"""Of a row in memory."""
LARGEST_SIZE = 4096
"""Layers, experts and K that a trace alone may claim."""

Numbers = NDArray[np.integer]


def is_foreign(path: Path) -> bool:
    """Tell whether a file is a CSV, or a Parquet table with a column of foreign traces only."""
    if path.suffix == ".csv":
        return True
    try:
        return "rank" in pq.read_schema(path).names
    except UNREADABLE:
        return False


class ForeignTrace(Trace):
    """The requests of a foreign trace, with counts only.

    A request's prefill rows are its step 0, whatever their `step`; its decode steps follow in the
    order of theirs. A step's tokens are the most that any layer saw: rows over K, rounded up.
    Layers count MoE layers from 0. Unless `shape` is given, L, J and K are the largest layer,
    expert and rank plus one, up to `LARGEST_SIZE`, and the hidden size is 0: unknown.

    Raises TraceError if the file is no such table, a number is out of range, or steps are missing.
    """

    def __init__(self, path: Path, shape: ModelShape | None = None) -> None:
        self.path = Path(path)
        table = self._table()
        shape = shape or self._inferred(table)
        self._check_ranges(table, shape)
        self.header = TraceHeader(shape, "float32", (), {"foreign": self.path.name})
        decode = self._decodes(table)
        request, step = (table[name].to_numpy() for name in ("request", "step"))
        step = np.where(decode, step, 0)
        if (step < 0).any():
            raise self._error(f"has decode step {step.min()}; count from 0")
        order = np.lexsort((step, decode, request))
        self._step, self._decode = step[order], decode[order]
        self._layer, self._expert = (table[name].to_numpy()[order] for name in ("layer", "expert"))
        numbers, starts = np.unique(request[order], return_index=True)
        stops = [*starts[1:].tolist(), len(order)]
        rows = map(slice, starts.tolist(), stops)
        self._rows = dict(zip(numbers.tolist(), rows, strict=True))

    def __exit__(self, *_: object) -> None:
        """Nothing is open any more."""

    def _request(self, number: int) -> TracedRequest:
        rows = self._rows[number]
        decode, step = self._decode[rows], self._step[rows]
        if decode[0]:
            raise self._error(f"request {number} has no prefill rows; add them")
        gaps = np.flatnonzero(decode[:-1] & (np.diff(step) > 1))
        if len(gaps):
            before, after = step[gaps[0]], step[gaps[0] + 1]
            raise self._error(
                f"request {number} decodes step {after} after {before}; add what lies between"
            )
        starts = 1 + np.flatnonzero((np.diff(step) != 0) | (np.diff(decode.astype(np.int8)) != 0))
        parts = zip(
            np.split(self._layer[rows], starts), np.split(self._expert[rows], starts), strict=True
        )
        steps = tuple(self._routed(number, i, *part) for i, part in enumerate(parts))
        return TracedRequest(number, (), (), steps)

    def _routed(self, number: int, step: int, layer: Numbers, expert: Numbers) -> RoutedStep:
        shape = self.header.shape
        place = layer.astype(np.int64) * shape.experts + expert
        flat = np.bincount(place, minlength=shape.layers * shape.experts)
        counts = flat.reshape(shape.layers, shape.experts)
        rows = counts.sum(axis=1)
        if not rows.all():
            empty = int(rows.argmin())
            raise self._error(
                f"request {number} routes nothing in layer {empty} of its step {step}"
            )
        return RoutedStep(-(-int(rows.max()) // shape.top_k), counts, None, None, None)

    def _table(self) -> pa.Table:
        with reading(self.path, fault="is no table of routing rows", remedy="write it again"):
            with self.path.open("rb") as file:
                is_parquet = file.read(4) == b"PAR1"
            types = pa.csv.ConvertOptions(column_types=COLUMNS)
            table = (
                self._read_parquet()
                if is_parquet
                else pa.csv.read_csv(self.path, convert_options=types)
            )
            missing = [name for name in COLUMNS.names if name not in table.column_names]
            if missing:
                raise TraceError(f"lacks the columns {', '.join(missing)}; name them so")
            table = table.select(COLUMNS.names).cast(COLUMNS)
            table.validate(full=True)
        if not len(table):
            raise self._error("has no rows; write it again")
        for name in COLUMNS.names:
            if table[name].null_count:
                raise self._error(f"has rows without a {name}; fill them in")
        if not pc.all(pc.is_finite(table["weight"])).as_py():
            raise self._error("has weights that are NaN or infinite; write it again")
        return table

    def _read_parquet(self) -> pa.Table:
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            check_size(file.metadata.num_rows * ROW_BYTES, self.path.stat().st_size)
            return file.read(COLUMNS.names)

    def _inferred(self, table: pa.Table) -> ModelShape:
        layers, experts, ranks = (
            min(max(1, int(table[name].to_numpy().max()) + 1), LARGEST_SIZE)
            for name in ("layer", "expert", "rank")
        )
        return ModelShape(layers, experts, ranks, 0)

    def _check_ranges(self, table: pa.Table, shape: ModelShape) -> None:
        limits = {"layer": shape.layers, "expert": shape.experts, "rank": shape.top_k}
        for name, limit in limits.items():
            values = table[name].to_numpy()
            wrong = values[(values < 0) | (values >= limit)]
            if len(wrong):
                raise self._error(
                    f"has {name} {wrong[0]}, not in 0..{limit - 1}; give the model it is of"
                )

    def _decodes(self, table: pa.Table) -> NDArray[np.bool_]:
        for name in table["phase"].unique().to_pylist():
            if name not in ("prefill", "decode"):
                raise self._error(f"has the phase {name!r}; write prefill or decode")
        decodes: NDArray[np.bool_] = pc.equal(table["phase"], "decode").to_numpy()
        return decodes
