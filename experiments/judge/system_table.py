"""What each system did in the runs of a figure: the measurements beside the claims' verdicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.style import system_name

NOTE = (
    "Sums over all models, datasets and budgets of the figure. Hit, late, miss: shares of the "
    "experts asked for that were resident, on their way, not requested. Ahead and on demand: what "
    "a request copies; in vain: of what was copied ahead. The others are shares of the time "
    "served: waits of the model; predictions, searches and their book-keeping, also where they "
    "run beside the model; the fewest loads that any system needs, on the busiest link; compute "
    "alone."
)
OPTIONS = ["search", "selection", "eviction"]
COPIED = ("prefetched", "wasted", "on_demand")
PREDICTION = ("context_collection", "search", "prefetch_issue", "update")


def system_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row of text per system; empty without runs. See NOTE for the columns."""
    if runs.empty:
        return pd.DataFrame()
    groups = by_system(runs)
    sums = groups.sum(numeric_only=True)
    asked = sums[["hits", "late", "misses"]].sum(axis=1)
    served, busy = 1e9 * sums["requests"], sums["busy_s"]
    # A run below its bound has none.
    bounded = groups["bound_times"].agg(lambda times: times.ge(1).all()).astype(bool)
    predicts = sum(sums[f"phase_{one}_s"] for one in PREDICTION)
    ahead, wasted, on_demand = (sums.get(f"bytes_{one}", busy * 0) for one in COPIED)
    return pd.DataFrame(
        {
            "system": sums.index,
            "hit, %": _share(sums["hits"], asked),
            "late, %": _share(sums["late"], asked),
            "miss, %": _share(sums["misses"], asked),
            "ahead, GB": (ahead / served).map(_number),
            "in vain, %": _share(wasted, ahead),
            "on demand, GB": (on_demand / served).map(_number),
            "waits for experts, %": _share(sums["phase_on_demand_wait_s"], busy),
            "waits for prefetches, %": _share(sums["phase_prefetch_wait_s"], busy),
            "predicts, %": _share(predicts, busy),
            "least loads, %": _share(sums["bound_link_s"].where(bounded), busy),
            "compute, %": _share(sums["bound_compute_s"].where(bounded), busy),
        }
    )


def by_system(runs: pd.DataFrame) -> Any:
    """Group the runs by system and, where they differ, by the option that tells them apart."""
    differ = runs.groupby("system")[OPTIONS].nunique(dropna=False).gt(1)
    testbeds = runs["testbed"].nunique()
    names = []
    for run in runs.to_dict("records"):
        options = [f"{one}={run[one]}" for one in OPTIONS if differ.loc[run["system"], one]]
        name = system_name(run["system"]) + (f" ({', '.join(options)})" if options else "")
        names.append(name + (f" on {run['testbed']}" if testbeds > 1 else ""))
    return runs.groupby(np.array(names), sort=False)


def _share(part: pd.Series[float], whole: pd.Series[float]) -> pd.Series[str]:
    return (100 * part / whole.where(whole > 0)).map(
        lambda one: "" if pd.isna(one) else f"{one:.1f}"
    )


def _number(value: float) -> str:
    """Return a number of three digits or more, never with an exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
