"""Traces of other projects: a CSV or Parquet file with one row per expert that a token chose.

Which token a row belongs to is not said, and neither are logits, embeddings or hidden states.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from finemoe.offload.policy import ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.trace import (
    UNREADABLE,
    Trace,
    TracedRequest,
    TraceError,
    TraceHeader,
    check_size,
    reading,
)

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

ROW_BYTES = 50  # in memory
LARGEST_SIZE = 4096
"""Layers, experts and K that a trace alone may claim."""
PREFILL = -1
"""The step of all prefill rows."""


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
        with reading(self.path, fault="is no table of routing rows", remedy="write it again"):
            rows = _read_table(self.path)
            largest = rows[["layer", "expert", "rank"]].max().clip(0, LARGEST_SIZE - 1)
            layers, experts, top_k = (largest + 1).tolist()
            shape = shape or ModelShape(layers, experts, top_k, 0)
            _check_values(rows, shape)
        self.header = TraceHeader(shape, "float32", (), {"foreign": self.path.name})
        rows["step"] = rows["step"].where(rows["phase"] == "decode", PREFILL)
        self._groups = rows.groupby("request")[["step", "layer", "expert"]]
        self._rows = dict.fromkeys(np.unique(rows["request"]).tolist())

    def prompt(self, number: int) -> tuple[int, ...]:
        self._row(number)
        return ()

    def request(self, number: int) -> TracedRequest:
        self._row(number)
        rows, shape = self._groups.get_group(number), self.header.shape
        numbers, steps = np.unique(rows["step"], return_inverse=True)
        if numbers[0] != PREFILL:
            raise self._error(f"request {number} has no prefill rows; add them")
        for before, after in itertools.pairwise(numbers[1:].tolist()):
            if after > before + 1:
                raise self._error(
                    f"request {number} decodes step {after} after {before}; add what lies between"
                )
        for step, layers in rows["layer"].groupby(steps):
            missing = np.setdiff1d(np.arange(shape.layers), layers)
            if len(missing):
                raise self._error(
                    f"request {number} routes nothing in layer {missing[0]} of its step {step}"
                )
        counts = np.zeros((len(numbers), shape.layers, shape.experts), np.int64)
        np.add.at(counts, (steps, rows["layer"], rows["expert"]), 1)
        tokens = -(-counts.sum(axis=2).max(axis=1) // shape.top_k)
        nothing = [None] * len(tokens)
        routed = tuple(map(RoutedStep, tokens.tolist(), counts, nothing, nothing, nothing))
        return TracedRequest(number, (), (), routed)


def _read_table(path: Path) -> pd.DataFrame:
    """Return the columns of a file; TraceError, or one of `UNREADABLE`, if it is no such table."""
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_size(file.metadata.num_rows * ROW_BYTES, path.stat().st_size)
            table = file.read(COLUMNS.names)
    else:
        options = pa.csv.ConvertOptions(column_types=COLUMNS)
        table = pa.csv.read_csv(path, convert_options=options)
    missing = [name for name in COLUMNS.names if name not in table.column_names]
    if missing:
        raise TraceError(f"lacks the columns {', '.join(missing)}; name them so")
    if not len(table):
        raise TraceError("has no rows; write it again")
    table = table.select(COLUMNS.names).cast(COLUMNS)
    table.validate(full=True)
    empty = [name for name in COLUMNS.names if table[name].null_count]
    if empty:
        raise TraceError(f"has rows without a {empty[0]}; fill them in")
    return table.to_pandas()


def _check_values(rows: pd.DataFrame, shape: ModelShape) -> None:
    """Raise TraceError for values that are out of range."""
    if not np.isfinite(rows["weight"]).all():
        raise TraceError("has weights that are NaN or infinite; write it again")
    for name in rows["phase"].unique():
        if name not in ("prefill", "decode"):
            raise TraceError(f"has the phase {name!r}; write prefill or decode")
    decoded = rows["step"][rows["phase"] == "decode"]
    if (decoded < 0).any():
        raise TraceError(f"has decode step {decoded.min()}; count from 0")
    limits = {"layer": shape.layers, "expert": shape.experts, "rank": shape.top_k}
    for name, limit in limits.items():
        wrong = rows[name][~rows[name].between(0, limit - 1)]
        if len(wrong):
            raise TraceError(
                f"has {name} {wrong.iloc[0]}, not in 0..{limit - 1}; give the model it is of"
            )
