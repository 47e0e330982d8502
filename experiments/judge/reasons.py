"""Why a claim does not hold, or holds weaker: sentences made of the records' own numbers.

Each sentence states what was measured; none states a cause that was not. What each system did is in
the table of its figure (`system_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from experiments.bootstrap import Draws, interval, limits
from experiments.judge.findings import (
    Claim,
    Finding,
    Part,
    cell_name,
    comparisons,
    quantity_name,
    run_draws,
    select,
)
from experiments.judge.system_table import by_system

SHOWN_PARTS = 4


def explain(claim: Claim, finding: Finding) -> str:
    """Return a paragraph on a claim that does not hold in full."""
    sentences = [*_spread(claim, finding)]
    if claim.kind == "value":
        sentences += (_other_columns if claim.table else _other_settings)(claim, finding)
    if claim.kind in ("reduction", "order") and not claim.table:
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
        means = comparisons(finding.parts)
        unclear = [label for label, draws in means.items() if limits(draws)[0] <= 0]
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
        for label, draws in comparisons(finding.parts).items():
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


def _shown(claim: Claim) -> Callable[[Draws], str]:
    scale, unit = claim.scale, f" {claim.shown_unit}".rstrip()

    def show(draws: Draws) -> str:
        text, ends = f"{draws[0] * scale:.3g}{unit}", interval(draws)
        return text + (f" ({ends[0] * scale:.3g} to {ends[1] * scale:.3g})" if ends else "")

    return show


def _other_columns(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say what the row of a table also holds, as that is what the value was computed from."""
    assert finding.table is not None
    for _, row in select(finding.table.rows, claim.where).select_dtypes("number").iterrows():
        yield "It follows from " + ", ".join(f"{k} = {v:.4g}" for k, v in row.items()) + "."


def _other_settings(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say what the metric is at every setting, of which the value is the one with the least."""
    (metric,) = claim.metric
    runs = finding.runs.sort_values(claim.x)
    for cell in finding.cells:
        here = select(runs, {"model": cell[0], "dataset": cell[1]}).to_dict("records")
        means = [(run[claim.x], run_draws(run, metric)[0]) for run in here]
        told = ", ".join(f"{at:g}: {1e3 * seconds:.4g} ms" for at, seconds in means)
        yield f"{quantity_name(metric)} by {quantity_name(claim.x)} ({cell_name(cell)}): {told}."


def _room(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say by how much the time served could be lowered at all, against each other system."""
    if claim.subject not in [*finding.runs["system"]]:
        return
    for name, runs in by_system(finding.runs).items():
        bounds, busy = runs[["bound_compute_s", "bound_link_s"]], runs["busy_s"].sum()
        if claim.subject in [*runs["system"]] or not busy or bounds.isna().to_numpy().any():
            continue
        room = 1 - bounds.max(axis=1).sum() / busy
        share = f"{100 * room:.1f} %"
        text = f"Against {name} no system could lower the time served by more than {share}"
        comparable = claim.kind == "reduction" and "ttft_s" not in claim.metric
        less = comparable and room < (claim.paper or 0)
        yield text + (", which is less than the paper's value." if less else ".")
