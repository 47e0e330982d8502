"""Why a claim does not hold, or holds weaker: sentences made of the records' own numbers.

Each sentence states what was measured; none states a cause that was not. What each system did is in
the table of its figure (`system_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments.measuring import Claim, Finding, Part, cell_name, quantity_name, run_draws
from experiments.resampling import interval
from experiments.system_table import by_system, total

SHOWN_PARTS = 4


def explain(claim: Claim, finding: Finding) -> str:
    """Return a paragraph on a claim that does not hold in full."""
    sentences = [*_spread(claim, finding)]
    if claim.kind == "value" and finding.tables:
        sentences += _other_columns(claim, finding)
    elif claim.kind == "value":
        sentences += _other_settings(claim, finding)
    served = {run.record["system"] for run in finding.runs}
    if claim.kind in ("reduction", "order") and str(claim.subject) in served:
        sentences += _room(claim, finding)
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


def _other_settings(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say what the metric is at every setting, of which the value is the one with the least."""
    (metric,) = claim.metric
    for cell in finding.cells:
        means = sorted(
            (float(run.setting(claim.x)), float(run_draws(run, metric)[0]))
            for run in finding.runs
            if run.cell == cell[:2]
        )
        told = ", ".join(f"{at:g}: {1e3 * seconds:.4g} ms" for at, seconds in means)
        yield f"{quantity_name(metric)} by {quantity_name(claim.x)} ({cell_name(cell)}): {told}."


def _room(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say by how much the time served could be lowered at all, against each other system."""
    for name, runs in by_system(finding.runs).items():
        busy = total(runs, "busy_seconds")
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
