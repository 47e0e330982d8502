"""One table of many runs: ``python -m experiments.compare multirun`` (any folders of records).

Modes are never mixed silently: every row says its own, and what its times are relative to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.errors import BAD_INPUT, UserError
from experiments.frames import run_frame
from experiments.records import RECORD, read_record

COLUMNS = (
    "model", "budget", "system", "TTFT ms", "TPOT ms", "hit", "late", "GB moved", "x bound",
    "lossless", "mode",
)  # fmt: skip
LEFT = ("model", "budget", "system", "lossless", "mode")


def find_records(folders: Sequence[Path]) -> list[Path]:
    """Return the run records under some folders; UserError if there are none."""
    records = sorted(path for folder in folders for path in folder.rglob(RECORD))
    if not records:
        raise UserError(f"no {RECORD} under {', '.join(map(str, folders))}; give folders of runs")
    return records


def comparison(records: Sequence[Path]) -> Table:
    """Return one row a run, by model, budget and system; `-` is what a record does not have."""
    frame = run_frame(records).sort_values(["model", "memory_budget_gb", "system"])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    for _, row in frame.iterrows():
        table.add_row(*_cells(row))
    return table


def _cells(row: pd.Series) -> tuple[str, ...]:
    accesses = row["hits"] + row["late"] + row["misses"]
    moved = (row["bytes_on_demand"] + row["bytes_prefetched"]) / 1e9
    lossless = read_record(Path(row["path"]))["summary"]["lossless"]
    return (
        row["model"],
        _number(row["memory_budget_gb"], "{:.1f} GB"),
        row["label"],
        _number(row["ttft_s"] * 1e3, "{:.1f}"),
        _number(row["tpot_s"] * 1e3, "{:.1f}"),
        _number(row["hit_rate"], "{:.1%}"),
        _number(row["late"] / accesses, "{:.1%}"),
        _number(moved, "{:.0f}"),
        _number(row["bound_times"], "{:.2f}"),
        {True: "yes", False: "NO", None: "-"}[lossless],
        row["mode"],
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or pd.isna(value) else form.format(value)


def main(arguments: Sequence[str]) -> None:
    """Print the table of all records under the folders given."""
    try:
        if not arguments:
            raise UserError("usage: python -m experiments.compare FOLDER [FOLDER ...]")
        Console(width=130).print(comparison(find_records([Path(one) for one in arguments])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


if __name__ == "__main__":
    main(sys.argv[1:])
