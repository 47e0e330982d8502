"""What each system did in the runs of a figure: the measurements beside the claims' verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.figures.style import system_name

HEADER = (
    "system",
    "hit, %",
    "late, %",
    "miss, %",
    "ahead, GB",
    "in vain, %",
    "on demand, GB",
    "waits for experts, %",
    "waits for prefetches, %",
    "predicts, %",
    "least loads, %",
    "compute, %",
)
NOTE = (
    "Sums over all models, datasets and budgets of the figure. Hit, late, miss: shares of the "
    "experts asked for that were resident, on their way, not requested. Ahead and on demand: what "
    "a request copies; in vain: of what was copied ahead. The others are shares of the time "
    "served: waits of the model; predictions, searches and their book-keeping, also where they "
    "run beside the model; the fewest loads that any system needs, on the busiest link; compute "
    "alone."
)
OPTIONS = ("search", "selection", "eviction")
PREDICTION = ("context_collection", "search", "prefetch_issue", "update")
Row = tuple[str, ...]


def system_table(runs: pd.DataFrame) -> tuple[Row, ...]:
    """Return the header and a row a system; empty without runs. See NOTE for what is in it."""
    if runs.empty:
        return ()
    return (HEADER, *(_row(name, mine) for name, mine in by_system(runs).items()))


def by_system(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the runs by system and, where they differ, by the option that tells them apart."""
    distinct = {system: mine[[*OPTIONS]].nunique(dropna=False) for system, mine in
                runs.groupby("system")}  # fmt: skip
    testbeds = runs["testbed"].nunique()
    names = []
    for run in runs.to_dict("records"):
        told = [f"{one}={run[one]}" for one in OPTIONS if distinct[run["system"]][one] > 1]
        name = system_name(run["system"]) + (f" ({', '.join(told)})" if told else "")
        names.append(name + (f" on {run['testbed']}" if testbeds > 1 else ""))
    return {str(name): mine for name, mine in runs.groupby(np.array(names), sort=False)}


def _row(name: str, runs: pd.DataFrame) -> Row:
    sums = runs.sum(numeric_only=True)
    asked = sums[["hits", "late", "misses"]].sum()
    served, busy = 1e9 * sums["requests"], sums["busy_s"]
    waits = [sums[f"phase_{one}_wait_s"] for one in ("on_demand", "prefetch")]
    predicts = sum(sums[f"phase_{one}_s"] for one in PREDICTION)
    # A run below its bound has none.
    bounded = runs["bound_times"].ge(1).all()
    bounds = [sums[f"bound_{one}_s"] if bounded else None for one in ("link", "compute")]
    return (
        name,
        *(_share(sums[one], asked) for one in ("hits", "late", "misses")),
        _plain(sums.get("bytes_prefetched", 0) / served),
        _share(sums.get("bytes_wasted", 0), sums.get("bytes_prefetched", 0)),
        _plain(sums.get("bytes_on_demand", 0) / served),
        *(_share(one, busy) for one in (*waits, predicts, *bounds)),
    )


def _share(part: float | None, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if part is not None and whole else ""


def _plain(value: float) -> str:
    """Return a number of three digits or more, never with an exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
