"""Judge the paper's claims from records: ``python -m experiments.judge.claims results=<folder>``.

The claims are those of `experiments/judge/paper.py` and, with ``claims=<file.py>``, of a file of
yours as well. `RULES` says when each holds. Writes `<results>/claims.json` and `claims.csv`.
"""

import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.bootstrap import Draws, interval, limits, ratio
from experiments.errors import UserError, command, words_given
from experiments.judge import findings, paper
from experiments.judge.findings import Claim, Finding, Part, Rows, Untestable, cell_name
from experiments.judge.frame import ResultsFolder, by_system
from finemoe.files import write_csv, write_json

HOLDS, WEAKER, FAILS = "holds", "holds weaker", "does not hold"
UNTESTABLE = "not testable here"
VERDICTS = (HOLDS, WEAKER, FAILS, UNTESTABLE)
STRONG_TREND = 0.8
FLAT = 0.25
ROUNDING = 1e-9
SHOWN_PARTS = 4
OPTIONS = {"results": "results", "mixed_modes": False, "claims": ""}

RULES = {  # when a claim of each kind holds; reports print this
    "reduction": "holds: the 95 % interval contains or exceeds the paper's value and lies above 0; "
    "holds weaker: it lies above 0 but below the paper's value.",
    "increase": "as for reductions; rises are over the baseline's mean over the cells.",
    "order": "holds: every comparison's mean over cells is as claimed with an interval that "
    "excludes 0, and so is the sign in every single cell; holds weaker: the former only.",
    "trend": f"rank correlation in the claimed direction: holds if its interval lies above 0 and "
    f"reaches {STRONG_TREND} or more; holds weaker if it lies above 0 (no interval in analyses of "
    "traces, where the points of a curve are of the same requests). Flat beyond a point: holds "
    f"if the curve rises before it (interval above 0) and the slope beyond is at most {FLAT} of "
    "that before (interval reaches it and lies below 1); holds weaker if the interval lies "
    "below 1.",
    "bound": "holds: the whole interval keeps the bound; holds weaker: the estimate does, or the "
    "interval keeps the weaker bound that the claim names.",
    "value": "holds: the paper's value is in the interval, or as near as the digits printed (or "
    "the tolerance named); holds weaker: within 10 % of it (or the weaker tolerance named).",
}


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim; numbers are in `unit`."""

    id: str
    section: str
    experiment: str
    kind: str
    text: str
    verdict: str = UNTESTABLE
    paper: float | None = None
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    paper_says: str = ""
    ours_says: str = ""
    measured: str = ""  # what `ours` is, such as the mean over cells
    bound: str = ""  # what the bound or an oracle would reach, where records say so
    mode: str = ""
    testbed: str = ""
    weights: str = ""
    requests: int = 0
    cells: tuple[str, ...] = ()
    paired: bool = True
    digests: tuple[str, ...] = ()
    why: str = ""  # why it does not hold, or holds weaker, from measurements; or what is missing


def load_claims(path: Path | None = None) -> list[Claim]:
    """Return the paper's claims, and those that a Python file defines; UserError if it cannot."""
    if path and not path.is_file():
        raise UserError(f"{path}: no such file; give claims=<a Python file>")
    defined = [*vars(paper).values(), *(runpy.run_path(str(path)).values() if path else ())]
    claims = [one for each in defined if isinstance(each, Claim) for one in each.each()]
    (name, count), *_ = Counter(one.id for one in claims).most_common(1)
    if count > 1:
        raise UserError(f"several claims are called {name}; rename one")
    return claims


def judge(
    results: ResultsFolder, mixed_modes: bool = False, claims: Path | None = None
) -> list[Verdict]:
    """Judge every claim, write claims.json and claims.csv; raise UserError or OSError."""
    verdicts = [judge_one(claim, results.rows, mixed_modes) for claim in load_claims(claims)]
    rows = [asdict(one) for one in verdicts]
    write_json(results.root / "claims.json", {"rules": RULES, "claims": rows})
    texts = [one | {name: "; ".join(one[name]) for name in ("cells", "digests")} for one in rows]
    write_csv(results.root / "claims.csv", pd.DataFrame(texts))
    return verdicts


def judge_one(claim: Claim, rows_of: Callable[[str], Rows], mixed_modes: bool = False) -> Verdict:
    """Return the verdict on one claim, of the rows of experiments by their ids."""
    paper, says, bound = None, claim.paper, claim.kind in ("at most", "at least")
    if not isinstance(claim.paper, str | None):
        paper, says = claim.paper * claim.scale, claim.number(claim.paper, digits=6)
    untestable = Verdict(
        **{name: getattr(claim, name) for name in ("id", "section", "experiment", "text", "unit")},
        kind="bound" if bound else claim.kind,
        paper=paper,
        paper_says=f"{claim.kind} {says}" if bound else says or "every margin above 0",
    )
    try:
        of_each = {one: rows_of(one) for one in (claim.experiment, claim.against) if one}
        for experiment, rows in of_each.items():
            if rows.empty:
                raise Untestable("", experiment)
        finding = claim.measure(*of_each.values())
        return replace(untestable, **_judged(claim, finding, mixed_modes))
    except KeyError as error:
        return replace(untestable, why=f"its records have no {error}")
    except Untestable as error:
        cause, experiment = (*error.args, claim.experiment)[:2]
        remedy = f"run python -m experiments.reproduce {experiment}" if experiment else ""
        return replace(untestable, why=": ".join(filter(None, (cause, remedy))))


def _judged(claim: Claim, finding: Finding, mixed_modes: bool) -> dict[str, Any]:
    modes = finding.distinct("mode")
    if len(modes) > 1 and not mixed_modes:
        mixed = f"its records mix the modes {', '.join(modes)}"
        raise Untestable(f"{mixed}: judge one mode, or ask for mixed_modes=true", "")
    draws, measured, verdict = decide(claim, finding)
    if not np.isfinite(draws[0]):
        raise Untestable(f"{measured}: not a finite number, as a baseline's value is 0", "")
    ends = [end * claim.scale for end in interval(draws) or ()]
    between = " to ".join(map(findings.significant, ends)) or "no interval"
    return {
        "verdict": verdict,
        "ours": float(draws[0]) * claim.scale,
        **dict(zip(("low", "high"), ends, strict=False)),
        "ours_says": f"{claim.number(draws[0])} ({between})",
        "measured": measured,
        "bound": _bound(claim, finding),
        "mode": " + ".join(modes),
        "testbed": ", ".join(finding.distinct("testbed")),
        "weights": ", ".join(finding.distinct("weights")),
        "requests": int(finding.subjects["requests"].sum()) if finding.of_runs else 0,
        "cells": tuple(map(cell_name, finding.cells)),
        "paired": finding.paired,
        "digests": tuple(finding.distinct("digest")),
        "why": "" if verdict == HOLDS else " ".join(_why(claim, finding)),
    }


def decide(claim: Claim, finding: Finding) -> tuple[Draws, str, str]:
    """Return the number that the verdict is about, what it is, and the verdict by `RULES`."""
    means, every = finding.means(), [draws for _, _, draws in finding.parts]
    if not every:
        raise Untestable("nothing to compare")
    if claim.kind == "order":
        least, draws = min(means.items(), key=lambda one: float(one[1][0]))
        measured = f"least margin, {least}"
        weaker = all(limits(one)[0] > 0 for one in means.values())
        holds = weaker and all(one[0] > 0 for one in every)
    elif claim.paper == "flat":
        before, beyond, *_ = means.values()
        draws = np.where(before > 0, ratio(beyond, before), 1.0)
        measured = "slope beyond over slope before"
        low, high = limits(draws)
        weaker = limits(before)[0] > 0 and high < 1
        holds = weaker and low <= FLAT
    elif claim.kind in ("at most", "at least"):
        sign, worst = (-1.0, np.max) if claim.kind == "at most" else (1.0, np.min)
        draws = np.mean(every, axis=0) if finding.share else worst(every, axis=0)
        measured = "share of the comparisons" if finding.share else "worst cell"
        low = min(sign * end for end in limits(draws))
        holds = low >= sign * claim.paper
        weaker = sign * draws[0] >= sign * claim.paper
        weaker |= claim.weaker is not None and low > sign * claim.weaker
    else:
        draws = np.mean(list(means.values()), axis=0)
        measured = "mean over cells" if len(finding.cells) > 1 else "one cell"
        low, high = limits(draws)
        if claim.kind == "value":
            distance, wide = abs(draws[0] - claim.paper) - ROUNDING, claim.weaker
            weaker = distance <= (0.1 * abs(claim.paper) if wide is None else wide)
            holds = low <= claim.paper <= high or distance <= claim.tolerance
        else:
            trend = claim.kind == "trend"
            measured = "mean rank correlation in the claimed direction" if trend else measured
            weaker = low > 0
            holds = weaker and high >= (STRONG_TREND if trend else claim.paper)
    return draws, measured, HOLDS if holds else WEAKER if weaker else FAILS


def _bound(claim: Claim, finding: Finding) -> str:
    """Say how far the subject's runs are from their bound, and what an oracle reached instead."""
    said = []
    if finding.subject and finding.of_runs:
        times, name = finding.subjects["bound_times"], findings.selector_name(finding.subject)
        if (mean := times[times >= 1].mean()) > 0:
            said.append(f"{name} takes {mean:.2f} times the least possible time")
    if finding.oracle is not None and np.isfinite(finding.oracle):
        change = finding.oracle - 1
        reached = claim.number(-change if claim.kind == "reduction" else change)
        said.append(f"an oracle reaches {reached}")
    return "; ".join(said)


def _why(claim: Claim, finding: Finding) -> Iterator[str]:
    means, parts = finding.means(), sorted(finding.parts, key=lambda part: float(part[2][0]))
    if claim.paper == "flat":
        yield from (f"The {label} is {_shown(claim, draws)}." for label, draws in means.items())
    elif claim.kind in ("order", "trend"):
        unclear = [label for label, draws in means.items() if limits(draws)[0] <= 0]
        yield f"{len(means) - len(unclear)} of {len(means)} comparisons are clear over the cells."
        if unclear:
            least = sorted(unclear, key=lambda label: float(means[label][0]))[:SHOWN_PARTS]
            listed = "; ".join(f"{one} {_shown(claim, means[one])}" for one in least)
            yield f"Not clear: {listed}."
        if against := [part for part in parts if part[2][0] <= 0]:
            cells = f"In {len(against)} of {len(parts)} single cells"
            yield f"{cells} it is the other way round or equal: {_listed(claim, against)}."
    elif len(parts) > 1:
        yield f"From cell to cell it goes from {_listed(claim, [parts[0], parts[-1]], ' to ')}."
    if claim.kind == "value":
        yield from finding.details
    if claim.kind in ("reduction", "order") and "hit_rate" not in finding.metrics:
        yield from _room(claim, finding)
    if not finding.paired:
        unpaired = "The systems did not serve the same requests"
        yield f"{unpaired}, so the interval is that of unpaired runs."


def _listed(claim: Claim, parts: list[Part], between: str = "; ") -> str:
    shown, more = parts[:SHOWN_PARTS], len(parts) - SHOWN_PARTS
    named = [f"{_shown(claim, draws)} ({label}; {cell_name(cell)})" for label, cell, draws in shown]
    return between.join(named) + (f"; and {more} more" if more > 0 else "")


def _shown(claim: Claim, draws: Draws) -> str:
    ends = [f"{end * claim.scale:.3g}" for end in interval(draws) or ()]
    text = f"{draws[0] * claim.scale:.3g} {claim.unit}".rstrip()
    return f"{text} ({' to '.join(ends)})" if ends else text


def _room(claim: Claim, finding: Finding) -> Iterator[str]:
    """Say by how much the time served could be lowered at all, against each other system."""
    if not (finding.subject and finding.of_runs):
        return
    for name, runs in by_system(finding.rows):
        bounds, busy = runs[["bound_compute_s", "bound_link_s"]], runs["busy_s"].sum()
        if finding.subject in [*runs["system"]] or not busy or bounds.isna().to_numpy().any():
            continue
        room = 1 - bounds.max(axis=1).sum() / busy
        text = f"Against {name} no system could lower the time served by more than"
        comparable = claim.kind == "reduction" and "ttft_s" not in finding.metrics
        less = comparable and room < claim.paper
        end = ", which is less than the paper's value." if less else "."
        yield f"{text} {100 * room:.1f} %{end}"


def arguments(doc: str | None) -> tuple[ResultsFolder, bool, Path | None]:
    """Return results folder, mixed_modes and claims of `key=value` words; UserError for others."""
    results, mixed_modes, claims = words_given(doc, OPTIONS, only=True)[0].values()
    return ResultsFolder(Path(results)), mixed_modes, Path(claims) if claims else None


@command()
def main() -> None:
    """Judge and print one line a claim; exit 2 for bad input."""
    for one in judge(*arguments(__doc__)):
        said = one.ours_says or one.why
        print(f"{one.verdict:>17}  {one.id}: paper {one.paper_says}, here {said}")


if __name__ == "__main__":
    main()
