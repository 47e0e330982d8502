"""Why a claim does not hold, or holds weaker: sentences made of the records' own numbers.

Each sentence states what was measured; none states a cause that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from experiments.evidence import Evidence, Run
from experiments.figures.style import system_name
from experiments.measuring import Claim, Finding, Part, cell_name, synchronous_seconds
from experiments.resampling import interval

SHOWN_PARTS = 4
PHASES = {
    "on_demand_wait": "waits for experts",
    "prefetch_wait": "waits for prefetches",
    "context_collection": "collects contexts",
    "search": "searches",
    "prefetch_issue": "issues prefetches",
    "update": "updates its history",
}


def explain(claim: Claim, finding: Finding, evidence: Evidence) -> str:
    """Return a paragraph on a claim that does not hold in full."""
    sentences = [*_spread(claim, finding)]
    if claim.kind == "value" and finding.tables:
        sentences += _other_columns(claim, finding)
    if finding.runs and claim.kind in ("reduction", "increase", "order", "trend", "bound"):
        sentences += _of_systems(claim, finding)
    if not finding.paired:
        sentences.append(
            "The systems did not serve the same requests, so the interval is that of unpaired runs."
        )
    return " ".join(sentences)


# Which comparisons, which cells -------------------------------------------------------------------


def _spread(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say which comparisons fail, over the cells and in single ones."""
    shown = _shown(claim)
    if claim.kind == "order" or (claim.kind == "trend" and claim.flat_after is None):
        means = finding.comparisons()
        unclear = [label for label, draws in means.items() if _low(draws) <= 0]
        yield f"{len(means) - len(unclear)} of {len(means)} comparisons are clear over the cells."
        if unclear:
            listed = sorted(unclear, key=lambda label: float(means[label][0]))[:SHOWN_PARTS]
            yield f"Not clear: {'; '.join(f'{one} {shown(means[one])}' for one in listed)}."
        against = sorted((p for p in finding.parts if p.draws[0] <= 0), key=lambda p: p.draws[0])
        if against:
            yield (
                f"In {len(against)} of {len(finding.parts)} single cells it is the other way round "
                f"or equal: {_listed(against, shown)}."
            )
    elif claim.kind == "trend":
        for label, draws in finding.comparisons().items():
            yield f"The {label} is {shown(draws)}."
    else:
        ranked = sorted(finding.parts, key=lambda part: float(part.draws[0]))
        if len(ranked) > 1:
            ends = [ranked[0], ranked[-1]]
            yield f"From cell to cell it goes from {_listed(ends, shown, ' to ')}."


def _listed(parts: Sequence[Part], shown: Callable[..., str], between: str = "; ") -> str:
    named = [f"{shown(p.draws)} ({p.label}; {cell_name(p.cell)})" for p in parts[:SHOWN_PARTS]]
    more = len(parts) - SHOWN_PARTS
    return between.join(named) + (f"; and {more} more" if more > 0 else "")


def _shown(claim: Claim) -> Callable[..., str]:
    scale, unit = 1.0, f" {claim.unit}" if claim.unit else ""
    if claim.kind in ("reduction", "increase", "order") or claim.unit == "%":
        scale, unit = 100.0, " %"
    elif claim.unit == "ms":
        scale = 1000.0

    def show(draws: np.ndarray) -> str:
        text = f"{draws[0] * scale:.3g}{unit}"
        limits = interval(draws)
        return text + (f" ({limits[0] * scale:.3g} to {limits[1] * scale:.3g})" if limits else "")

    return show


def _low(draws: np.ndarray) -> float:
    limits = interval(draws)
    return limits[0] if limits else float(draws[0])


def _other_columns(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say what the row of a table also holds, as that is what the value was computed from."""
    rows = finding.tables[0].rows
    for name, value in claim.where.items():
        rows = rows[rows[name] == value] if name in rows.columns else rows
    numbers = rows.select_dtypes("number")
    for _, row in numbers.iterrows():
        yield "It follows from " + ", ".join(f"{k} = {v:.4g}" for k, v in row.items()) + "."


# What the systems did -----------------------------------------------------------------------------


def _of_systems(claim: Claim, finding: Finding) -> Iterator[str]:
    groups = _by_system(finding.runs)
    for name, runs in groups.items():
        yield _accesses(name, runs)
    for name, runs in groups.items():
        yield _traffic(name, runs)
    for name, runs in groups.items():
        yield from _seconds(name, runs)
    if claim.kind in ("reduction", "order") and str(claim.subject) in _systems(finding.runs):
        yield from _room(claim, finding)


def _by_system(runs: Sequence[Run]) -> Mapping[str, list[Run]]:
    """Return the runs by system and, where they differ, by the option that tells them apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        options = [
            f"{name}={run.setting(f'system.{name}')}"
            for name in ("search", "selection", "eviction")
            if len({str(one.setting(f"system.{name}")) for one in runs
                    if one.record["system"] == run.record["system"]}) > 1
        ]  # fmt: skip
        name = system_name(run.record["system"]) + (f" ({', '.join(options)})" if options else "")
        if len({one.record["testbed"] for one in runs}) > 1:
            name += f" on {run.record['testbed']}"
        groups.setdefault(name, []).append(run)
    return groups


def _systems(runs: Sequence[Run]) -> set[str]:
    return {run.record["system"] for run in runs}


def _total(runs: Sequence[Run], name: str) -> float:
    return float(sum(run.summary.get(name) or 0 for run in runs))


def _plain(value: float) -> str:
    """Return a number of three digits or more, never with an exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _accesses(name: str, runs: Sequence[Run]) -> str:
    parts = [_total(runs, one) for one in ("hits", "late", "misses")]
    asked = sum(parts) or 1.0
    hit, late, miss = (100 * part / asked for part in parts)
    return (
        f"{name} finds {hit:.1f} % of the experts resident, {late:.1f} % on their way and "
        f"{miss:.1f} % not requested."
    )


def _traffic(name: str, runs: Sequence[Run]) -> str:
    ahead, demand, vain = (
        _total(runs, f"bytes_{one}") / 1e9 for one in ("prefetched", "on_demand", "wasted")
    )
    served = sum(len(run.requests) for run in runs) or 1
    text = (
        f"{name} moves {_plain(ahead / served)} GB a request ahead and "
        f"{_plain(demand / served)} GB on demand"
    )
    return text + (f"; {100 * vain / ahead:.1f} % of the former are in vain." if ahead else ".")


def _seconds(name: str, runs: Sequence[Run]) -> Iterator[str]:
    """Say where the time goes, as shares of the time in which requests were served."""
    busy = _total(runs, "busy_seconds")
    if not busy:
        return
    phases = {
        key: sum(run.summary.get("phase_seconds", {}).get(key, 0.0) for run in runs) / busy
        for key in PHASES
    }
    told = [f"{PHASES[key]} {100 * share:.1f} %" for key, share in phases.items() if share >= 5e-4]
    if told:
        own = 100 * sum(synchronous_seconds(run) for run in runs) / busy
        yield (
            f"Of the {_plain(busy)} s that it serves, {name} {', '.join(told)} "
            f"(on the critical path, loads on demand aside: {own:.2g} %)."
        )
    bounds = [bound for run in runs if (bound := run.summary.get("bound"))]
    if len(bounds) == len(runs):
        link = sum(bound["link_s"] for bound in bounds)
        compute = sum(bound["compute_s"] for bound in bounds)
        yield (
            f"The fewest loads that any system needs take {100 * link / busy:.1f} % of that time "
            f"on the busiest link, compute {100 * compute / busy:.1f} %."
        )


def _room(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say by how much the time served could be lowered at all, against each other system."""
    for name, runs in _by_system(finding.runs).items():
        busy = _total(runs, "busy_seconds")
        bounds = [run.summary.get("bound") for run in runs]
        mine = all(run.record["system"] == claim.subject for run in runs)
        if mine or not busy or not all(bounds):
            continue
        least = sum(max(bound["compute_s"], bound["link_s"]) for bound in bounds if bound)
        room = 1 - least / busy
        text = f"Against {name} no system could lower the time served by more than {room:.1%}"
        below = (
            claim.kind == "reduction" and "ttft_s" not in claim.metric and room < (claim.paper or 0)
        )
        yield text.replace("%", " %") + (
            ", which is less than the paper's value." if below else "."
        )
