"""Run records as tables, one row a run or one row a request: what figures and claims read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.records import RECORD, read_record, read_requests

BOOTSTRAP_RESAMPLES = 2000
LATENCIES = ("ttft_s", "tpot_s", "e2el_s")
PHASES = (
    "context_collection",
    "on_demand_wait",
    "prefetch_wait",
    "search",
    "prefetch_issue",
    "update",
)
OPTIONS = ("search", "selection", "eviction", "predictor")
"""Ablation options of systems that figures tell apart; None where a system has no such option."""
SYSTEM_CONFIGS = Path(__file__).parent.parent / "conf" / "system"
NOT_OPTIONS = ("_target_", "label")

Floats = NDArray[np.float64]


def run_frame(records: Sequence[Path]) -> pd.DataFrame:
    """Return one row a run, in the order of `records`, which are folders or their run.json.

    Identity: `digest` (the folder's name), `system`, `label` (the system and its options that are
    not at their defaults), the OPTIONS, `model`, `dataset`, `memory_budget_gb`, `memory_budget` (as
    asked, text), `batch_size`, `prefetch_distance`, `store_capacity`, `workload` (offline or
    online), `mode`, `testbed`, `weights`, `routing`, `seed`, `path` (of the run.json).
    Measured: `ttft_s`, `tpot_s`, `e2el_s`, `iteration_s` (mean time of an iteration), `hit_rate`,
    each with `_low` and `_high` (95 % interval of the mean), `hits`, `late`, `misses`, every
    `bytes_*`, `slot_budget_bytes`, `dense_bytes`, `requests`, `iterations`, `busy_s`, `phase_*_s`
    (seconds in all), `bound_times` (time over the least possible).
    What a record does not have is NaN or None. Intervals of latencies are the record's own where
    each request was a batch of its own; requests of one batch share their times, so otherwise
    batches are resampled, as they are for the hit rate, which records give without an interval.
    Raises UserError for a path that holds no run record.
    """
    return pd.DataFrame([_row(_record_path(path)) for path in records])


def request_frame(records: Sequence[Path]) -> pd.DataFrame:
    """Return one row a request: its table's columns, and what names its run in `run_frame`.

    Raises UserError for a path that holds no run record.
    """
    tables = []
    for path in map(_record_path, records):
        table = read_requests(path)
        names = _identity(path, read_record(path))
        # A table's own column wins; none has the name of a key today.
        tables.append(table.assign(**{k: v for k, v in names.items() if k not in table}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def one_mode(frame: pd.DataFrame, what: str, mixed_modes: bool) -> None:
    """Raise UserError if records of several modes meet in `what` and nobody asked for that."""
    modes = sorted(frame["mode"].unique())
    if len(modes) > 1 and not mixed_modes:
        raise UserError(
            f"{what} mixes {' and '.join(modes)} records; draw them apart or set mixed_modes=true"
        )


def _record_path(path: Path) -> Path:
    record = path / RECORD if path.is_dir() else path
    if not record.is_file():
        raise UserError(f"{path} holds no {RECORD}; give folders that runs have left")
    return record


def _row(path: Path) -> dict[str, Any]:
    record = read_record(path)
    summary, requests = record["summary"], read_requests(path)
    bound = summary.get("bound") or {}
    names = _identity(path, record)
    return {
        **names,
        "requests": len(requests),
        **_latencies(summary, requests, record["seed"]),
        **_hits(summary, requests, record["seed"]),
        **{key: _number(summary, key) for key in summary if key.startswith("bytes_")},
        "slot_budget_bytes": _number(summary, "slot_budget_bytes"),
        "dense_bytes": _number(summary, "dense_bytes"),
        **_iterations(summary, requests, names["workload"], record["seed"]),
        "bound_times": _number(bound, "times"),
    }


def _number(summary: Mapping[str, Any], key: str) -> float:
    """Return a number of a summary, NaN where the system does not count it."""
    value = summary.get(key)
    return math.nan if value is None else value


def _identity(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    config = record["config"]
    system, workload = config["system"], config["workload"]
    return {
        "digest": path.parent.name,
        "system": record["system"],
        "label": system_label(record["system"], config),
        **{option: system.get(option) for option in OPTIONS},
        "model": record["model"],
        "dataset": record["dataset"],
        "memory_budget_gb": record.get("memory_budget_gb"),
        "memory_budget": str(config["memory_budget"]),
        "batch_size": workload.get("batch_size"),
        "prefetch_distance": system.get("prefetch_distance"),
        "store_capacity": system.get("store_capacity"),
        "workload": "online" if "rate" in workload else "offline",
        "mode": record["mode"],
        "testbed": record["testbed"],
        "weights": record["weights"],
        "routing": record["routing"],
        "seed": record["seed"],
        "path": str(path),
    }


def system_label(system: str, config: Mapping[str, Any]) -> str:
    """Return the system's name and each option that is not at its default."""
    defaults = _defaults(system, json.dumps(config["model"]))
    options = config["system"].items()
    changed = [f"{k}={v}" for k, v in options if k in defaults and v != defaults[k]]
    return " ".join([system, *changed])


@lru_cache
def _defaults(system: str, model: str) -> dict[str, Any]:
    path = {one.stem: one for one in SYSTEM_CONFIGS.glob("*.yaml")}.get(system)
    if path is None:
        return {}
    composed = OmegaConf.create({"system": OmegaConf.load(path), "model": json.loads(model)})
    plain: Any = OmegaConf.to_container(composed.system, resolve=True)
    return {key: value for key, value in plain.items() if key not in NOT_OPTIONS}


def _latencies(summary: Mapping[str, Any], requests: pd.DataFrame, seed: int) -> dict[str, float]:
    row: dict[str, float] = {}
    shared = requests["batch"].nunique() < len(requests)
    for name in LATENCIES:
        found = summary.get(name)
        mean = found["mean"] if found else math.nan
        low, high = (found and found["ci95"]) or (math.nan, math.nan)
        if shared and found:
            batches = requests.dropna(subset=[name]).groupby("batch")[name]
            low, high = ratio_interval(batches.sum(), batches.size(), seed)
        row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return row


def _hits(summary: Mapping[str, Any], requests: pd.DataFrame, seed: int) -> dict[str, float]:
    rate = summary.get("expert_hit_rate")
    counts = {key: _number(summary, key) for key in ("hits", "late", "misses")}
    low = high = math.nan
    if rate is not None and {"hits", "late", "misses"} <= set(requests):
        # Requests of a batch carry the same counts: those of the batch.
        batches = requests.groupby("batch")[["hits", "late", "misses"]].first()
        low, high = ratio_interval(batches["hits"], batches.sum(axis=1), seed)
    rates = {"hit_rate": _number(summary, "expert_hit_rate"), "hit_rate_low": low}
    return {**rates, "hit_rate_high": high, **counts}


def _iterations(
    summary: Mapping[str, Any], requests: pd.DataFrame, workload: str, seed: int
) -> dict[str, float]:
    """Return what iterations took; their number is known where a batch stays together."""
    count = mean = low = high = math.nan
    busy = summary.get("busy_seconds", math.nan)
    phases = summary.get("phase_seconds") or {}
    if workload == "offline":
        batches = requests.groupby("batch")[["output_tokens", "e2el_s"]].max()
        count = float(batches["output_tokens"].sum())
        mean = float(batches["e2el_s"].sum()) / count
        low, high = ratio_interval(batches["e2el_s"], batches["output_tokens"], seed)
    return {
        "iterations": count,
        "iteration_s": mean,
        "iteration_s_low": low,
        "iteration_s_high": high,
        "busy_s": busy,
        **{f"phase_{name}_s": phases.get(name, math.nan) for name in PHASES},
    }


def ratio_interval(
    totals: Iterable[float], weights: Iterable[float], seed: int
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of sum(totals) / sum(weights), pairs resampled together.

    NaN for fewer than two pairs, which say nothing about their spread.
    """
    above, below = (np.asarray(list(values), dtype=float) for values in (totals, weights))
    if len(above) < 2 or not below.all():
        return math.nan, math.nan
    draw = np.random.default_rng(seed).integers(0, len(above), (BOOTSTRAP_RESAMPLES, len(above)))
    ratios: Floats = above[draw].sum(axis=1) / below[draw].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
