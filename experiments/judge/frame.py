"""Run records as one table, a row per run: what figures, claims, the report and `compare` read."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from experiments import CONF
from experiments.bootstrap import interval, request_draws
from experiments.errors import UserError
from experiments.run import records
from experiments.style import system_name

PREDICTION = ("context_collection", "search", "prefetch_issue", "update")
PHASES = ("on_demand_wait", "prefetch_wait", *PREDICTION)
OPTIONS = ("search", "selection", "eviction", "predictor")  # None where a system has no such
BOUND = ("times", "compute_s", "link_s", "tpot_s")
COUNTS = ("hits", "late", "misses", "host", "slot_budget_bytes", "dense_bytes")
IDENTITY = ("system", "model", "dataset", "mode", "testbed", "weights", "routing", "seed")
NOT_OPTIONS = ("_target_", "label", "look", "prediction_us")
IDS = (  # of experiments, in the paper's order
    "table1", "1b", "3a", "3b", "3c", "4", "8", "9", "10", "11", "12", "13", "14a", "14b", "15",
    "16a", "16b", "17", "18", "readings", "unknowns",
)  # fmt: skip


def run_frame(runs: Sequence[Path]) -> pd.DataFrame:
    """Return one row per run, in the order of `runs`, which are folders or their run.json.

    Identity: `digest` (the folder's name), `system`, `label` (the system and its options that are
    not at their defaults), the OPTIONS, `model`, `dataset`, `memory_budget_gb`, `memory_budget` (as
    asked, text), `batch_size`, `prefetch_distance`, `store_capacity`, `workload` (offline or
    online), `mode`, `testbed`, `weights`, `routing`, `seed`, `path` (of the run.json).
    Measured: `ttft_s`, `tpot_s`, `e2el_s`, `iteration_s` (mean time of an iteration), `hit_rate`,
    each with `_low` and `_high` (95 % interval of the mean, NaN where nothing varied), the COUNTS,
    every `bytes_*`, `requests`, `iterations`, `busy_s`, `phase_*_s` (seconds in all),
    `bound_times` (time over the least possible), `bound_compute_s`, `bound_link_s`,
    `bound_tpot_s`.
    Whole: `record`, and `table`, its requests, one row per request, with `service_s`, the latency
    without the queueing. What a record does not have is NaN or None. Raises UserError for a path
    that holds no run record, or a damaged one, and for simulated runs of the same requests that
    replay different routing.
    """
    paths = [path / records.RECORD if path.is_dir() else path for path in runs]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise UserError(f"{absent[0]}: no run record; give folders that runs have left")
    frame = pd.DataFrame([_row(path) for path in paths])
    _check_routing(frame.to_dict("records"))
    return frame


def _check_routing(runs: Sequence[Mapping[Any, Any]]) -> None:
    """Raise UserError if simulated runs of the same requests replay different answers to them."""
    known: dict[str, tuple[int, str]] = {}
    for run in runs:
        config, table = run["record"]["config"], run["table"]
        if run["mode"] != "simulated" or "tokens" not in table:
            continue
        of = [run[name] for name in ("model", "dataset", "weights", "seed")]
        asked = json.dumps([*of, config["workload"], config.get("routing")], sort_keys=True)
        tokens = table.sort_values("request")["tokens"]
        own = hash(tuple(map(tuple, tokens))), run["path"]
        first = known.setdefault(asked, own)
        if first[0] != own[0]:
            raise UserError(
                f"{first[1]} and {own[1]} replay different routing of the same requests, as traces "
                "that two kinds of processor recorded; make one again with the other's traces="
            )


def _row(path: Path) -> dict[str, Any]:
    record, requests = records.read_record(path), records.read_requests(path)
    requests["service_s"] = requests["e2el_s"] - requests.get("queueing_s", 0.0)
    summary, row = record["summary"], identity(path, record)
    phases, bound = summary.get("phase_seconds") or {}, summary.get("bound") or {}
    # Iterations are known where a batch stays together.
    batches = requests.groupby("batch")[["output_tokens", "e2el_s"]].max().sum()
    iterations = float(batches["output_tokens"]) if row["workload"] == "offline" else math.nan
    means = {name: (summary.get(name) or {}).get("mean") for name in ("ttft_s", "tpot_s", "e2el_s")}
    means["hit_rate"] = summary.get("expert_hit_rate")
    means["iteration_s"] = float(batches["e2el_s"]) / iterations if iterations else None
    counts = (*COUNTS, *(key for key in summary if key.startswith("bytes_")))
    row["iterations"] = iterations
    for metric, mean in means.items():
        ends = None
        if mean is not None and not math.isnan(mean):
            # A record may say more than its requests do.
            with suppress(ValueError):
                ends = interval(request_draws(requests, metric, row["dataset"]))
        row[metric] = math.nan if mean is None else mean
        row[f"{metric}_low"], row[f"{metric}_high"] = ends or (math.nan, math.nan)
    numbers = {
        **{key: summary.get(key) for key in counts},
        "requests": len(requests),
        "busy_s": summary.get("busy_seconds"),
        **{f"phase_{name}_s": phases.get(name) for name in PHASES},
        **{f"bound_{name}": bound.get(name) for name in BOUND},
    }
    known = {key: math.nan if one is None else one for key, one in numbers.items()}
    return {**row, **known, "record": record, "table": requests}


def identity(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is of, column to value."""
    config = record["config"]
    system, workload = config["system"], config["workload"]
    return {
        "digest": path.parent.name,
        **{name: record[name] for name in IDENTITY},
        "label": system_label(record["system"], config),
        **{name: system.get(name) for name in (*OPTIONS, "prefetch_distance", "store_capacity")},
        "memory_budget_gb": record.get("memory_budget_gb"),
        "memory_budget": str(config["memory_budget"]),
        "batch_size": workload.get("batch_size"),
        "workload": "online" if "rate" in workload else "offline",
        "path": str(path),
    }


def system_label(system: str, config: Mapping[str, Any]) -> str:
    """Return the system's name and each option that is not at its default, `protect` as well."""
    defaults = _defaults(system, json.dumps(config["model"]))
    options = config["system"] | {"protect": config.get("protect", defaults.get("protect"))}
    other = {k: v for k, v in options.items() if v != defaults.get(k, v) and k not in NOT_OPTIONS}
    return " ".join([system, *(f"{key}={value}" for key, value in other.items())])


@lru_cache
def _defaults(system: str, model: str) -> dict[str, Any]:
    # A record's text is compared with names, not made a path.
    path = {one.stem: one for one in (CONF / "system").glob("*.yaml")}.get(system)
    if path is None:
        return {}
    reading = OmegaConf.load(CONF / "reading" / "prototype.yaml")
    parts = {"system": OmegaConf.load(path), "model": json.loads(model), "reading": reading}
    options: Any = OmegaConf.to_container(OmegaConf.create(parts).system, resolve=True)
    return options | {"protect": reading.protect}


def commit(origin: Mapping[str, Any], digits: int | None = None) -> str:
    """Return the commit that a record or an analysis was made by, and whether it was changed."""
    changed = " with uncommitted changes" if origin.get("git_dirty") else ""
    return f"{str(origin.get('git_commit') or 'unknown')[:digits]}{changed}"


def by_system(runs: pd.DataFrame) -> Any:
    """Group the runs by system and, where they differ, by the option that tells them apart."""
    several = runs["testbed"].nunique() > 1
    differ = runs.groupby("system")[[*OPTIONS]].nunique(dropna=False).gt(1)
    names = []
    for run in runs.to_dict("records"):
        options = [f"{one}={run[one]}" for one in OPTIONS if differ.loc[run["system"], one]]
        name = system_name(run["system"]) + (f" ({', '.join(options)})" if options else "")
        names.append(f"{name} on {run['testbed']}" if several else name)
    return runs.groupby(np.array(names), sort=False)


class ResultsFolder:
    """Where the parts of reproduced results lie, and their content.

    <root>/runs/<digest>/run.json, requests.parquet    one run; all of them: runs.tar.xz
    <root>/analysis/<id>/                              one analysis of routing traces
    <root>/figures/<id>.png, .pdf, .csv, .txt          what was drawn
    <root>/experiments/<id>.json                       an experiment: written last
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; run python -m experiments.reproduce all")
        self.root, self.figures = root, root / "figures"
        records.unpack_runs(root)

    def run(self, digest: str) -> Path:
        return self.root / "runs" / digest

    def analysis(self, name: str) -> Path:
        return self.root / "analysis" / name

    def experiment(self, name: str) -> Path:
        return self.root / "experiments" / f"{name}.json"

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The `run_frame` of all complete runs, those of no experiment as well, by digest."""
        frame = run_frame(sorted((self.root / "runs").glob(f"*/{records.RECORD}")))
        return frame.set_axis(frame["digest"].tolist()) if len(frame) else frame

    def runs_of(self, experiment: str) -> pd.DataFrame:
        """Return an experiment's complete runs, without those that are missing."""
        digests = dict.fromkeys(self.index(experiment).get("runs", ()))
        return self.runs.loc[[one for one in digests if one in self.runs.index]]

    def index(self, experiment: str) -> dict[str, Any]:
        """Return what an experiment consists of, empty where it was not made."""
        path, due = self.experiment(experiment), ("experiment record", "remove it and draw again")
        return records.read_checked(path, records.INDEX, *due) if path.exists() else {}

    def rows(self, experiment: str) -> pd.DataFrame:
        """Return an analysis's table with `digest`, `mode`, `weights`, or the complete runs."""
        record = self.analysis_record(experiment)
        if not record:
            return self.runs_of(experiment)
        path = self.analysis(experiment) / f"{next(iter(record['tables']), '')}.csv"
        if not path.exists():
            return pd.DataFrame()
        return records.read_table(path).assign(
            digest=hashlib.sha256(path.read_bytes()).hexdigest(),
            mode=record["mode"],
            weights=", ".join(sorted({one["weights"] for one in record["subjects"]})),
        )

    def analysis_record(self, name: str) -> dict[str, Any]:
        path = self.analysis(name) / "record.json"
        due = "analysis record", "remove it, analyse again"
        return records.read_checked(path, records.ANALYSIS, *due) if path.exists() else {}
