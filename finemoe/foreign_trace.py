"""Traces of other projects, which say which experts were activated and little else.

Tables have a row per expert that a token chose; streams have the ids of every token. Neither has
logits or embeddings. In their place stand sparse ones, so that systems that predict can be tried:
a gate's probabilities are the shares of the chosen experts, and a token's embedding is what the
token before it chose in all layers.
"""

import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finemoe.offload.policy import FloatArray, ModelShape
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

NAMES = {  # what others call the columns
    "request": ("request_id", "req_id", "seq_id", "sequence", "prompt_id"),
    "phase": ("stage", "is_decode"),
    "step": ("iteration", "iter", "token", "token_idx", "position", "pos"),
    "layer": ("layer_id", "layer_idx", "layer_index", "layer_number"),
    "rank": ("k", "slot", "choice", "expert_rank"),
    "expert": ("expert_id", "expert_idx", "expert_index"),
    "weight": ("gate_weight", "routing_weight", "score", "prob", "probability"),
}
PHASES = {"0": "prefill", "1": "decode"}
# What a line of a stream may call its ids.
STREAM_KEYS = ("experts", "topk_experts", "topk_indices", "expert_ids", "indices")
STREAMS = (".npy", ".npz", ".jsonl")
NO_SHARE = 1e-12
ROW_BYTES = 50  # in memory
LARGEST_SIZE = 4096  # layers, experts and K that a trace alone may claim
PREFILL = -1  # the step of all prefill rows


def is_foreign(path: Path) -> bool:
    """Tell whether a file is a CSV, a stream, or a Parquet table as only others write it."""
    if path.suffix in (".csv", *STREAMS):
        return True
    try:
        return bool({"rank", *NAMES["rank"]} & {*pq.read_schema(path).names})
    except UNREADABLE:
        return False


def foreign_trace(path: Path, shape: ModelShape | None = None) -> Trace:
    """Return the requests of a foreign table, see docs/trace-format.md.

    Unless `shape` is given, L, J and K are the largest layer, expert and rank plus one, up to
    `LARGEST_SIZE`. Raises TraceError if the file is no such table, a number is out of range, or,
    when its request is read, steps are missing.
    """
    with reading(path, fault="is no table of routing rows", remedy="write it again"):
        rows = _read_table(path)
        largest = rows[["layer", "expert", "rank"]].max().clip(0, LARGEST_SIZE - 1)
        layers, experts, top_k = (largest + 1).tolist()
        shape = shape or ModelShape(layers, experts, top_k, 0)
        _check_values(rows, shape)
    rows["step"] = rows["step"].where(rows["phase"] == "decode", PREFILL)
    groups = rows.groupby("request")[["step", "layer", "expert", "weight"]]
    read = partial(_request_of_table, path, shape, groups)
    numbers = np.unique(rows["request"]).tolist()
    return Trace(path, _header(path, shape), {number: partial(read, number) for number in numbers})


def _request_of_table(path: Path, shape: ModelShape, groups: Any, number: int) -> TracedRequest:
    rows, which = groups.get_group(number), f"{path}: request {number}"
    numbers, steps = np.unique(rows["step"], return_inverse=True)
    if numbers[0] != PREFILL:
        raise TraceError(f"{which} has no prefill rows; add them")
    for before, after in itertools.pairwise(numbers[1:].tolist()):
        if after > before + 1:
            raise TraceError(f"{which} decodes step {after} after {before}; add what lies between")
    size, where = (len(numbers), shape.layers, shape.experts), (steps, rows["layer"])
    counts, weights = np.zeros(size, np.int64), np.zeros(size)
    np.add.at(counts, (*where, rows["expert"]), 1)
    np.add.at(weights, (*where, rows["expert"]), rows["weight"])
    for step, layer in np.argwhere(counts.sum(axis=2) == 0):
        raise TraceError(f"{which} routes nothing in layer {layer} of its step {step}")
    tokens = -(-counts.sum(axis=2).max(axis=1) // shape.top_k)
    shares = _shares(weights, counts)
    each = np.repeat(shares.swapaxes(0, 1), tokens, axis=1)
    return TracedRequest(number, (), (), _steps(counts, each, tokens.tolist()))


def routed_stream(path: Path, shape: ModelShape, prompt: int, output: int) -> Trace:
    """Return requests cut from the experts that token after token chose: docs/trace-format.md.

    A request takes `prompt` tokens, which are one prefill, and `output` - 1 more; what is left at
    the end is not used. Raises TraceError if the file is no such stream of `shape`.
    """
    with reading(path, fault="is no stream of expert ids", remedy="write it again"):
        read = _read_lines if path.suffix == ".jsonl" else _read_arrays
        streams = [_checked(ids, shape) for ids in read(path, shape)]
    length = prompt + output - 1
    cut = [ids[n : n + length] for ids in streams for n in range(0, len(ids), length)]
    whole = enumerate(one for one in cut if len(one) == length)
    rows = {number: partial(_request_of_ids, number, ids, shape, prompt) for number, ids in whole}
    if not rows:
        longest = max(map(len, streams), default=0)
        cause = f"has {longest} tokens in a row, a request takes {length}"
        raise TraceError(f"{path}: {cause}; lower workload.input_tokens or output_tokens")
    return Trace(path, _header(path, shape), rows)


def _request_of_ids(
    number: int, ids: NDArray[np.int64], shape: ModelShape, prompt: int
) -> TracedRequest:
    chosen = np.zeros((shape.layers, len(ids), shape.experts), np.int64)
    np.put_along_axis(chosen, ids.swapaxes(0, 1), 1, axis=2)
    tokens = [prompt] + [1] * (len(ids) - prompt)
    starts = np.cumsum([0, *tokens[:-1]])
    counts = np.add.reduceat(chosen, starts, axis=1).swapaxes(0, 1)
    shares = chosen / chosen.sum(axis=2, keepdims=True)
    return TracedRequest(number, (), (), _steps(counts, shares, tokens))


def _header(path: Path, shape: ModelShape) -> TraceHeader:
    said = f"{path.name}: maps are sparse, the choices before stand for embeddings"
    shape = replace(shape, hidden_size=shape.size)
    return TraceHeader(shape, "float32", ("logits", "embeddings"), {"foreign": said})


def _shares(weights: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
    """Return what adds up to 1 over the experts, (..., J): weights, or counts where they are 0."""
    total = weights.sum(axis=-1, keepdims=True)
    counted = counts / counts.sum(axis=-1, keepdims=True)
    return np.where(total > 0, weights / np.maximum(total, NO_SHARE), counted)


def _steps(
    counts: NDArray[Any], shares: NDArray[Any], tokens: Sequence[int]
) -> tuple[RoutedStep, ...]:
    """Return the steps of a request by counts (S, L, J), all tokens' shares (L, T, J)."""
    logits: FloatArray = np.log(np.maximum(shares, NO_SHARE)).astype(np.float32)
    before = shares.swapaxes(0, 1).reshape(shares.shape[1], -1).astype(np.float32)
    embeddings = np.concatenate([np.zeros_like(before[:1]), before[:-1]])
    rows = [slice(stop - n, stop) for stop, n in zip(np.cumsum(tokens), tokens, strict=True)]
    return tuple(
        RoutedStep(count, one, logits[:, own], embeddings[own], None)
        for count, one, own in zip(tokens, counts, rows, strict=True)
    )


def _read_arrays(path: Path, shape: ModelShape) -> list[NDArray[Any]]:
    """Return the ids of each array of a file, (tokens, L, K)."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                check_size(sum(one.file_size for one in file.infolist()), path.stat().st_size)
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else list(loaded.values())
    except Exception as error:  # Of a damaged file, zipfile and numpy raise unrelated types.
        raise ValueError(str(error)) from error
    found = [one for one in arrays if one.ndim == 3]
    # Beside ids there may be their weights.
    found = [one for one in found if np.issubdtype(one.dtype, np.integer)] or found
    if not found:
        raise TraceError("has no array of three dimensions; store (tokens, layers, K)")
    return [ids if ids.shape[1] == shape.layers else ids.swapaxes(0, 1) for ids in found]


def _read_lines(path: Path, shape: ModelShape) -> list[NDArray[Any]]:
    """Return the one stream of a file with an object a line."""
    of_layers: dict[int, list[list[int]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            entry: Mapping[str, Any] = json.loads(line)
            layer = _value(entry, ("layer", *NAMES["layer"]), number)
            of_layers.setdefault(layer, []).extend(_value(entry, STREAM_KEYS, number))
    return [np.stack([np.array(of_layers[layer]) for layer in sorted(of_layers)], axis=1)]


def _value(entry: Mapping[str, Any], keys: Sequence[str], line: int) -> Any:
    for key in keys:
        if key in entry:
            return entry[key]
    raise TraceError(f"line {line} lacks {keys[0]!r}; name it so")


def _checked(ids: NDArray[Any], shape: ModelShape) -> NDArray[np.int64]:
    """Return ids (tokens, L, K) that are a model's; TraceError if they are another's."""
    due = shape.layers, shape.top_k
    if ids.shape[1:] != due or not np.issubdtype(ids.dtype, np.integer):
        has = f"ids of {ids.dtype}, {ids.shape[1]} layers, top {ids.shape[2]}"
        raise TraceError(f"has {has}, not whole numbers of {due[0]}, top {due[1]}; give its model")
    if ids.size and not 0 <= ids.min() <= ids.max() < shape.experts:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        limit = f"not in 0..{shape.experts - 1}"
        raise TraceError(f"has expert {wrong}, {limit}; give the model it is of")
    return ids.astype(np.int64)


def _read_table(path: Path) -> pd.DataFrame:
    """Return the columns of a file; TraceError, or one of `UNREADABLE`, if it is no such table."""
    with path.open("rb") as opened:
        is_parquet = opened.read(4) == b"PAR1"
        opened.seek(0)
        preamble = sum(1 for _ in itertools.takewhile(lambda line: line.startswith(b"#"), opened))
    if is_parquet:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_size(file.metadata.num_rows * ROW_BYTES, path.stat().st_size)
            table = file.read()
    else:
        table = pa.csv.read_csv(path, pa.csv.ReadOptions(skip_rows=preamble))
    table = table.rename_columns(_ours(table.column_names))
    if "weight" not in table.column_names:
        table = table.append_column("weight", pa.array(np.ones(len(table))))
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
    rows: pd.DataFrame = table.to_pandas()
    rows["phase"] = rows["phase"].replace(PHASES)
    return rows


def _ours(names: Sequence[str]) -> list[str]:
    """Return column names with ours in place of what others call them, unless ours is there."""
    known = {other: name for name, others in NAMES.items() if name not in names for other in others}
    return [known.get(name.strip().lower(), name.strip()) for name in names]


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
