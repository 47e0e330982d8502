"""One table of many runs: ``python -m experiments.compare FOLDER [FOLDER ...]``

It takes folders of run records, such as `multirun`, and leaves nothing. What all runs share is said
once, above; a row has every setting in which its run differs, so that modes, testbeds and points of
a sweep never mix silently. Records of several commits are told apart below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from experiments.errors import UserError, command, words_given
from experiments.frames import system_label
from experiments.records import PLACES, RECORD, read_record

ABSENT = "-"
MEASURED = {
    "TTFT ms": "{:.1f}", "TPOT ms": "{:.1f}", "hit": "{:.1%}", "late": "{:.1%}",
    "GB moved": "{:.0f}", "x bound": "{:.2f}",
}  # fmt: skip
SAID = (*PLACES, "memory_budget", "weights")
"""Settings that say where results go, or that `_told` has."""


def find_records(folders: Sequence[Path]) -> list[Path]:
    """Return the run records under some folders; UserError if there are none."""
    records = sorted(path for folder in folders for path in folder.rglob(RECORD))
    if not records:
        raise UserError(f"no {RECORD} under {', '.join(map(str, folders))}; give folders of runs")
    return records


def compare(paths: Sequence[Path], console: Console) -> None:
    """Print one row a run, by model, budget and system; `-` is what a record does not have."""
    records = [read_record(path) for path in paths]
    runs = told_apart(paths, records)
    ranked = sorted(runs.index, key=lambda one: [_order(value) for value in runs.loc[one]])
    runs = runs.loc[ranked].reset_index(drop=True).map(_shown)
    records = [records[one] for one in ranked]
    commits = pd.Series(map(_commit, records))
    several = commits.nunique() > 1
    facts = runs if several else runs.assign(commit=commits)
    shared = [name for name in facts if facts[name].nunique() == 1]
    said = [f"{name} {facts[name][0]}" for name in shared if facts[name][0] != ABSENT]
    console.print(f"runs: {len(records)}; {', '.join(said)}")
    own = runs.drop(columns=shared, errors="ignore")
    measured = measurements([record["summary"] for record in records])
    table = _table(own, measured, several)
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, table).maximum > console.width:
        # A value is a word of its own, with its name; none is broken that a line can hold.
        words = [
            " ".join(f"{name}={value}" for name, value in row.items() if value != ABSENT)
            for _, row in own.iterrows()
        ]
        table = _table(pd.DataFrame({"run": words}), measured, several)
    console.print(table)
    if (measured["x bound"] < 1).any():
        console.print("x bound: below 1 is none; compute alone was timed on a busy machine")
    for commit, rows in commits.groupby(commits, sort=False) if several else ():
        console.print(f"commit {commit}: rows {', '.join(str(one + 1) for one in rows.index)}")


def told_apart(paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a run: what it is of, and every other setting in which the runs differ."""
    runs = pd.DataFrame([_told(record) for record in records], dtype=object)
    flat = [pd.json_normalize(record["config"]).iloc[0].to_dict() for record in records]
    null = [{key: "null" for key, value in one.items() if value is None} for one in flat]
    settings = pd.DataFrame([a | b for a, b in zip(flat, null, strict=True)], dtype=object)
    for name, values in settings.items():
        group, short = str(name).split(".")[0], str(name).split(".")[-1]
        # Two models, systems, ... differ in all their settings, which says nothing; nor does it
        # when an older record lacks a setting.
        among = runs[group] if group in runs else pd.Series(0, runs.index)
        texts = values.map(_shown).where(values.map(_shown) != ABSENT)
        if group not in SAID and texts.groupby(among).nunique().max() > 1:
            runs[name if short in runs else short] = values
    if runs.map(str).duplicated().any():
        runs["folder"] = [str(path.parent) for path in paths]
    return runs


def measurements(summaries: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row a run of the columns MEASURED; NaN is what a record does not have."""
    names = ["ttft_s.mean", "tpot_s.mean", "expert_hit_rate", "hits", "late", "misses"]
    names += ["bytes_on_demand", "bytes_prefetched", "bound.times"]
    found = pd.json_normalize(summaries).reindex(columns=names).astype(float)
    late = found["late"] / (found["hits"] + found["late"] + found["misses"])
    moved = (found["bytes_on_demand"] + found["bytes_prefetched"]) / 1e9
    milliseconds = (found[name] * 1e3 for name in names[:2])
    columns = (*milliseconds, found["expert_hit_rate"], late, moved, found["bound.times"])
    return pd.DataFrame(dict(zip(MEASURED, columns, strict=True)))


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    budget = record["memory_budget_gb"]
    return {
        "model": record["model"],
        "budget_GB": budget and round(budget, 2),
        "system": system_label(record["system"], record["config"]),
        "dataset": record["dataset"],
        "workload": "online" if "rate" in record["config"]["workload"] else "offline",
        "weights": record["weights"],
        "testbed": record["testbed"],
        "mode": record["mode"],
        "lossless": {True: "yes", False: "NO"}.get(record["summary"]["lossless"], ABSENT),
    }


def _commit(record: Mapping[str, Any]) -> str:
    changed = " with uncommitted changes" if record.get("git_dirty") else ""
    return f"{str(record.get('git_commit') or 'unknown')[:7]}{changed}"


def _order(value: Any) -> tuple[bool, Any]:
    """Rank numbers by value, before all else by its text."""
    number = isinstance(value, int | float) and value == value
    return not number, value if number else str(value)


def _shown(value: Any) -> str:
    """Return a setting as text that cannot steer a terminal."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ABSENT
    return "".join(one for one in str(value) if one.isprintable())


def _table(runs: pd.DataFrame, measured: pd.DataFrame, numbered: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    if numbered:
        table.add_column("#", justify="right")
    for name in runs:
        # Of words that do not fit on one line, none is broken.
        table.add_column(str(name), overflow="fold")
    for name in MEASURED:
        table.add_column(name, justify="right", no_wrap=True)
    for one in runs.index:
        numbers = [
            ABSENT if pd.isna(v) or (name == "x bound" and v < 1) else MEASURED[name].format(v)
            for name, v in measured.loc[one].items()
        ]
        table.add_row(*[str(one + 1)][:numbered], *runs.loc[one], *numbers)
    return table


@command()
def main() -> None:
    """Print the table of all records under the folders given."""
    folders = [Path(one) for one in words_given(__doc__, {})]
    if not folders:
        raise UserError("name folders of runs; see python -m experiments.compare --help")
    compare(find_records(folders), Console(markup=False, highlight=False, emoji=False))


if __name__ == "__main__":
    main()
