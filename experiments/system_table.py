"""What each system did in the runs of a figure: the measurements beside the claims' verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.evidence import Run
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


def system_table(runs: Sequence[Run]) -> tuple[Row, ...]:
    """Return the header and a row a system; empty without runs. See NOTE for what is in it."""
    if not runs:
        return ()
    return (HEADER, *(_row(name, mine) for name, mine in by_system(runs).items()))


def by_system(runs: Sequence[Run]) -> Mapping[str, list[Run]]:
    """Return the runs by system and, where they differ, by the option that tells them apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = [one for one in runs if one.record["system"] == run.record["system"]]
        settings = {name: f"system.{name}" for name in OPTIONS}
        options = [
            f"{name}={run.setting(setting)}"
            for name, setting in settings.items()
            if len({str(one.setting(setting)) for one in alike}) > 1
        ]
        name = system_name(run.record["system"]) + (f" ({', '.join(options)})" if options else "")
        if len({one.record["testbed"] for one in runs}) > 1:
            name += f" on {run.record['testbed']}"
        groups.setdefault(name, []).append(run)
    return groups


def total(runs: Sequence[Run], name: str) -> float:
    """Return the sum of an entry of the records' summaries."""
    return float(sum(run.summary.get(name) or 0 for run in runs))


def _row(name: str, runs: Sequence[Run]) -> Row:
    found = [total(runs, one) for one in ("hits", "late", "misses")]
    asked = sum(found)
    ahead, demand, vain = (
        total(runs, f"bytes_{one}") for one in ("prefetched", "on_demand", "wasted")
    )
    served = 1e9 * sum(len(run.requests) for run in runs)
    busy = total(runs, "busy_seconds")
    return (
        name,
        *(_share(part, asked) for part in found),
        _plain(ahead / served),
        _share(vain, ahead),
        _plain(demand / served),
        _share(_phases(runs, "on_demand_wait"), busy),
        _share(_phases(runs, "prefetch_wait"), busy),
        _share(_phases(runs, *PREDICTION), busy),
        _share(_bounds(runs, "link_s"), busy),
        _share(_bounds(runs, "compute_s"), busy),
    )


def _phases(runs: Sequence[Run], *names: str) -> float:
    phases = [run.summary.get("phase_seconds") or {} for run in runs]
    return float(sum(one.get(name, 0.0) for one in phases for name in names))


def _bounds(runs: Sequence[Run], name: str) -> float | None:
    """Return the sum of a bound; None if not every run has it. A run below it has none."""
    bounds = [bound for run in runs if (bound := run.summary.get("bound")) and bound["times"] >= 1]
    return sum(bound[name] for bound in bounds) if len(bounds) == len(runs) else None


def _share(part: float | None, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if part is not None and whole else ""


def _plain(value: float) -> str:
    """Return a number of three digits or more, never with an exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
