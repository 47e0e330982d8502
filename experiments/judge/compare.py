"""One table of many runs: ``python -m experiments.judge.compare FOLDER [FOLDER ...]``

It takes folders of run records, such as `multirun`, and leaves nothing. What all runs share is said
once, above; a row has every setting in which its run differs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from rich import box
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table

from experiments.errors import UserError, command, words_given
from experiments.judge.frame import commit, identity
from experiments.run.records import PLACES, RECORD, read_record
from finemoe.offload.policy import Phase

ABSENT = "-"
MEASURED = {
    "TTFT ms": "{:.1f}", "TPOT ms": "{:.1f}", "hit": "{:.1%}", "late": "{:.1%}",
    "GB moved": "{:.0f}", "x bound": "{:.2f}",
}  # fmt: skip
NUMBERS = [
    "hits", "late", "misses", "host", "ttft_s.mean", "tpot_s.mean", "expert_hit_rate",
    "bound.times", "bytes_on_demand", "bytes_prefetched",
]  # fmt: skip
IDENTITY = {"model": "model", "memory_budget_gb": "budget_GB", "label": "system"}
IDENTITY |= {name: name for name in ("dataset", "workload", "weights", "testbed", "mode")}
SAID = (*PLACES, "memory_budget", "weights")  # where results go, or what IDENTITY has


def find_records(folders: Sequence[Path]) -> list[Path]:
    """Return the run records under some folders; UserError if there are none."""
    records = sorted(path for folder in folders for path in folder.rglob(RECORD))
    if not records:
        raise UserError(f"no {RECORD} under {', '.join(map(str, folders))}; give folders of runs")
    return records


def compare(paths: Sequence[Path], console: Console) -> None:
    """Print one row per run, by model, budget and system; `-` is what a record does not have."""
    records = [read_record(path) for path in paths]
    runs = _settings(paths, records)
    ranked = sorted(runs.index, key=lambda one: [_order(value) for value in runs.loc[one]])
    runs = runs.loc[ranked].map(_shown)
    shared = runs.columns[runs.nunique() == 1]
    said = [f"{name} {one}" for name, one in runs[shared].iloc[0].items() if one != ABSENT]
    console.print(f"runs: {len(runs)}; {', '.join(said)}")
    own = runs.drop(columns=shared)
    facts = pd.json_normalize([record["summary"] for record in records])
    measured = _measured(facts.reindex(columns=NUMBERS).astype(float)).loc[ranked]
    table = _table(own.join(measured))
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, table).maximum > console.width:
        # Then a setting is a word with its name, and broken only if it is longer than a line.
        each = [[f"{k}={v}" for k, v in row.items() if v != ABSENT] for _, row in own.iterrows()]
        table = _table(measured.assign(run=[" ".join(one) for one in each])[["run", *measured]])
    console.print(table)
    unions = []
    for phase in get_args(Phase):
        if (name := f"phases.{phase}.union_over_capacity.mean") in facts:
            ends = dict.fromkeys(f"{one:.2f}" for one in facts[name].agg(["min", "max"]))
            unions.append(f"{phase} {' to '.join(ends)}")
    if unions:
        console.print(f"experts of a step over a layer's slots: {', '.join(unions)}")
    if "bound.times" in facts and facts["bound.times"].lt(1).any():
        console.print("x bound: below 1 is none; compute alone was timed on a busy machine")


def _settings(paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per run: what it is of, and every other setting in which the runs differ."""
    every = pd.DataFrame(map(identity, paths, records), dtype=object)
    runs = every[[*IDENTITY]].set_axis(list(IDENTITY.values()), axis=1)
    runs["budget_GB"] = runs["budget_GB"].map(lambda one: one and round(one, 2))
    lossless = {True: "yes", False: "NO", None: ABSENT}
    runs["lossless"] = [lossless[record["summary"]["lossless"]] for record in records]
    flat = [pd.json_normalize(record["config"]).iloc[0].to_dict() for record in records]
    # An older record may lack a setting, which says nothing; None is a value.
    null = [{key: "null" if value is None else value for key, value in one.items()} for one in flat]
    for name, values in pd.DataFrame(null, dtype=object).items():
        group, short = str(name).split(".")[0], str(name).split(".")[-1]
        # Two models, systems, ... differ in all their settings, which says nothing.
        among = runs[group] if group in runs else pd.Series(0, runs.index)
        texts = values.map(_shown).replace(ABSENT, None)
        if group not in SAID and texts.groupby(among).nunique().max() > 1:
            runs[name if short in runs else short] = values
    if runs.map(str).duplicated().any():
        runs["folder"] = [str(path.parent) for path in paths]
    runs["commit"] = [commit(record, digits=7) for record in records]
    return runs


def _measured(facts: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "TTFT ms": facts["ttft_s.mean"] * 1e3,
        "TPOT ms": facts["tpot_s.mean"] * 1e3,
        "hit": facts["expert_hit_rate"],
        "late": facts["late"] / facts[["hits", "late", "misses", "host"]].sum(axis=1),
        "GB moved": (facts["bytes_on_demand"] + facts["bytes_prefetched"]) / 1e9,
        "x bound": facts["bound.times"].where(facts["bound.times"] >= 1),
    }
    texts = {name: values.map(MEASURED[name].format) for name, values in columns.items()}
    return pd.DataFrame(texts).where(pd.DataFrame(columns).notna(), ABSENT)


def _order(value: Any) -> tuple[bool, Any]:
    """Rank numbers by value, before all else by its text."""
    number = pd.api.types.is_number(value) and value == value
    return not number, value if number else str(value)


def _shown(value: Any) -> str:
    """Return a setting as text that cannot steer a terminal."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ABSENT
    return "".join(one for one in str(value) if one.isprintable())


def _table(cells: pd.DataFrame) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in cells:
        justify: JustifyMethod = "right" if name in MEASURED else "left"
        table.add_column(str(name), justify=justify, no_wrap=name in MEASURED, overflow="fold")
    for row in cells.itertuples(index=False):
        table.add_row(*row)
    return table


@command()
def main() -> None:
    """Print the table of all records under the folders given."""
    folders = [Path(one) for one in words_given(__doc__, {})[1]]
    if not folders:
        raise UserError("name folders of runs; see python -m experiments.judge.compare --help")
    compare(find_records(folders), Console(markup=False, highlight=False, emoji=False))


if __name__ == "__main__":
    main()
