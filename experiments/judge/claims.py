"""Judge the paper's claims from records: ``python -m experiments.judge.claims results=<folder>``.

Every number comes from run records and analysis tables; `claims.yaml` says what the paper claims,
`RULES` says when a claim holds. Intervals are bootstrap intervals (`experiments/bootstrap.py`).
Writes `<results>/claims.json` and `<results>/claims.csv`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from experiments.bootstrap import interval, limits
from experiments.errors import UserError, command, words_given
from experiments.figures.style import model_name
from experiments.judge.findings import (
    Claim,
    Finding,
    Untestable,
    cell_name,
    comparisons,
    measure,
    run_draws,
    select,
)
from experiments.judge.frame import ResultsFolder
from experiments.judge.reasons import explain
from finemoe.files import atomic_write

CLAIMS = Path(__file__).parent / "claims.yaml"
HOLDS, WEAKER, FAILS = "holds", "holds weaker", "does not hold"
UNTESTABLE = "not testable here"
VERDICTS = (HOLDS, WEAKER, FAILS, UNTESTABLE)
STRONG_TREND = 0.8
FLAT = 0.25

RULES = {
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
"""When a claim of each kind holds; otherwise it does not. Reports print this."""


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim; numbers are in `unit`."""

    id: str
    section: str
    experiment: str
    kind: str
    text: str
    verdict: str
    paper: float | None = None
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    paper_says: str = ""
    ours_says: str = ""
    measured: str = ""
    """What `ours` is: a mean over cells, the least margin, the worst cell."""
    bound: str = ""
    """What the bound or an oracle would reach, where records say so."""
    mode: str = ""
    testbed: str = ""
    weights: str = ""
    requests: int = 0
    cells: tuple[str, ...] = ()
    paired: bool = True
    digests: tuple[str, ...] = ()
    why: str = ""
    """Why it does not hold, or holds weaker, from measurements; or what is missing."""


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """Return the claims; one with `paper` by model becomes one a model. ValueError if malformed."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(path))
    claims = [one for entry in raw["claims"] for one in _expanded(entry)]
    names = [claim.id for claim in claims]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}: ids are not unique: {sorted(n for n in names if names.count(n) > 1)}"
        )
    return claims


def _expanded(entry: Mapping[str, Any]) -> list[Claim]:
    known = {field.name for field in fields(Claim)}
    if set(entry) - known:
        raise ValueError(f"claim {entry.get('id')}: unknown {', '.join(set(entry) - known)}")
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    if not isinstance(entry.get("paper"), Mapping):
        return [Claim(**plain)]
    claims = []
    for model, paper in entry["paper"].items():
        own = {"id": f"{entry['id']}-{model}", "paper": paper}
        claim = Claim(**{**plain, **own, "where": {**entry.get("where", {}), "model": model}})
        text = claim.text.format(model=model_name(model), paper=_number(claim, paper, digits=6))
        claims.append(replace(claim, text=text))
    return claims


# Judging ------------------------------------------------------------------------------------------


def judge(results: ResultsFolder, mixed_modes: bool = False) -> list[Verdict]:
    """Judge every claim, write claims.json and claims.csv into the folder, return the verdicts.

    A claim over records of several modes is judged only with `mixed_modes`, and marked. Raises
    UserError if the folder is unreadable or cannot be written to.
    """
    verdicts = [judge_one(claim, results, mixed_modes) for claim in load_claims()]
    rows = [asdict(one) for one in verdicts]
    text = json.dumps({"rules": RULES, "claims": rows}, indent=1, allow_nan=False) + "\n"
    write_text(results.root / "claims.json", text)
    frame = pd.DataFrame(rows)
    for name in ("cells", "digests"):
        frame[name] = frame[name].map("; ".join)
    write_text(results.root / "claims.csv", frame.to_csv(index=False))
    return verdicts


def judge_one(claim: Claim, results: ResultsFolder, mixed_modes: bool = False) -> Verdict:
    """Return the verdict on one claim."""
    try:
        finding = measure(claim, results)
        modes = _distinct(finding, "mode")
        if len(modes) > 1 and not mixed_modes:
            raise Untestable(
                f"its records mix the modes {', '.join(modes)}: judge one mode, or ask for "
                "mixed_modes=true"
            )
        if not np.isfinite(finding.draws[0]):
            raise Untestable(f"{finding.label}: not a finite number, as a baseline's value is 0")
    except Untestable as reason:
        return Verdict(**_said(claim), verdict=UNTESTABLE, why=str(reason))
    return _verdict(claim, finding, results)


def decide(claim: Claim, finding: Finding) -> str:
    """Return holds, holds weaker or does not hold, by `RULES`."""
    ours, (low, high) = float(finding.draws[0]), limits(finding.draws)
    if claim.kind in ("reduction", "increase"):
        assert claim.paper is not None
        return FAILS if low <= 0 else HOLDS if high >= claim.paper else WEAKER
    if claim.kind == "order":
        clear = all(limits(draws)[0] > 0 for draws in comparisons(finding.parts).values())
        everywhere = all(part.draws[0] > 0 for part in finding.parts)
        return FAILS if not clear else HOLDS if everywhere else WEAKER
    if claim.kind == "trend" and claim.flat_after is not None:
        rise = next(iter(comparisons(finding.parts).values()))
        if limits(rise)[0] <= 0 or high >= 1:
            return FAILS
        return HOLDS if low <= FLAT else WEAKER
    if claim.kind == "trend":
        return FAILS if low <= 0 else HOLDS if high >= STRONG_TREND else WEAKER
    if claim.kind == "bound":
        return _decide_bound(claim, ours, low, high)
    return _decide_value(claim, ours, low, high)


def _decide_bound(claim: Claim, ours: float, low: float, high: float) -> str:
    sign = -1.0 if claim.at_most is not None else 1.0
    limit = claim.at_most if claim.at_most is not None else claim.at_least
    assert limit is not None
    worst = min(sign * low, sign * high)
    if worst >= sign * limit:
        return HOLDS
    weakly = claim.weakly is not None and worst > sign * claim.weakly
    return WEAKER if weakly or sign * ours >= sign * limit else FAILS


def _decide_value(claim: Claim, ours: float, low: float, high: float) -> str:
    assert claim.paper is not None
    rounding = 1e-9
    if low <= claim.paper <= high or abs(ours - claim.paper) <= claim.tolerance + rounding:
        return HOLDS
    wide = claim.weaker_tolerance
    wide = 0.1 * abs(claim.paper) if wide is None else wide
    return WEAKER if abs(ours - claim.paper) <= wide + rounding else FAILS


# What a verdict says ------------------------------------------------------------------------------


def _verdict(claim: Claim, finding: Finding, results: ResultsFolder) -> Verdict:
    decided = decide(claim, finding)
    ours, scale, ends = float(finding.draws[0]), claim.scale, interval(finding.draws)
    between = " to ".join(_plain(end * scale) for end in ends or ()) or "no interval"
    runs, table = finding.runs, finding.table
    digests = [table.digest] if table else runs["digest"]
    return Verdict(
        **_said(claim),
        verdict=decided,
        ours=ours * scale,
        low=ends[0] * scale if ends else None,
        high=ends[1] * scale if ends else None,
        ours_says=f"{_number(claim, ours)} ({between})",
        measured=finding.label,
        bound=_bound(claim, finding, results),
        mode=table.mode if table else " + ".join(_distinct(finding, "mode")),
        testbed=", ".join(_distinct(finding, "testbed")),
        weights=", ".join(_weights(claim, finding, results)),
        requests=0 if table else int(_subjects(claim, finding)["requests"].sum()),
        cells=tuple(cell_name(cell) for cell in finding.cells),
        paired=finding.paired,
        digests=tuple(sorted(digests)),
        why="" if decided == HOLDS else explain(claim, finding),
    )


def _said(claim: Claim) -> dict[str, Any]:
    names = ("id", "section", "experiment", "kind", "text")
    limit = claim.at_most if claim.at_most is not None else claim.at_least
    paper = claim.paper if claim.paper is not None else limit
    return {
        **{name: getattr(claim, name) for name in names},
        "paper": None if paper is None else paper * claim.scale,
        "unit": claim.shown_unit,
        "paper_says": _paper(claim, paper),
    }


def _paper(claim: Claim, value: float | None) -> str:
    if claim.kind in ("order", "trend"):
        return claim.direction or "flat" if claim.kind == "trend" else "every margin above 0"
    bound = "at most " if claim.at_most is not None else "at least "
    return (bound if claim.kind == "bound" else "") + _number(claim, value or 0.0, digits=6)


def _number(claim: Claim, value: float, digits: int = 3) -> str:
    return f"{_plain(value * claim.scale, digits)} {claim.shown_unit}".strip()


def _plain(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, never with an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:.{min(decimals, 3)}f}"
    return text.rstrip("0").rstrip(".") if digits > 3 and "." in text else text


def _subjects(claim: Claim, finding: Finding) -> pd.DataFrame:
    """Return the runs of the claim's subject, or all if it ranks without one."""
    return finding.runs if claim.ranking else select(finding.runs, claim.subject)


def _distinct(finding: Finding, name: str) -> list[str]:
    return [] if finding.table else sorted(set(finding.runs[name]))


def _weights(claim: Claim, finding: Finding, results: ResultsFolder) -> list[str]:
    if finding.table is None:
        return _distinct(finding, "weights")
    subjects = results.analysis_record(claim.experiment).get("subjects", ())
    return sorted({one["weights"] for one in subjects})


def _bound(claim: Claim, finding: Finding, results: ResultsFolder) -> str:
    """Say how far the subject's runs are from their bound, and what an oracle reached instead."""
    if finding.table:
        return ""
    said = []
    times = _subjects(claim, finding)["bound_times"]
    times = times[times >= 1]
    if len(times) and not claim.ranking:
        said.append(f"FineMoE takes {times.mean():.2f} times the least possible time")
    if claim.kind in ("reduction", "increase"):
        runs = results.runs_of(claim.experiment)
        oracles = select(select(runs, claim.where), "oracle").drop_duplicates(["model", "dataset"])
        others = pd.concat(select(finding.runs, one) for one in claim.against)
        pairs = oracles.merge(others, on=["model", "dataset"], suffixes=("", "_other"))
        if len(oracles) >= len(finding.cells):
            said.append(f"an oracle reaches {_number(claim, _with_oracle(claim, pairs))}")
    return "; ".join(said)


def _with_oracle(claim: Claim, pairs: pd.DataFrame) -> float:
    """Return what the mean change would be with an oracle; a row has its run and another's."""
    sign = 1.0 if claim.kind == "increase" else -1.0
    changes = [
        run_draws(pair, metric)[0] / run_draws(pair | {"table": pair["table_other"]}, metric)[0] - 1
        for pair in pairs.to_dict("records")
        for metric in claim.metric
    ]
    return sign * float(np.mean(changes))


# Files and command --------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raise UserError if it cannot be written."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(text)
    except OSError as error:
        cause = f"cannot write to {path.parent}: {error.strerror}"
        raise UserError(f"{cause}; choose another results=") from error


def arguments(doc: str | None) -> tuple[ResultsFolder, bool]:
    """Return the results folder and mixed_modes from `key=value` words; UserError for others."""
    options, others = words_given(doc, {"results": "results", "mixed_modes": "false"})
    if others:
        raise UserError(f"{others[0]}: give results=<folder>, and mixed_modes=true if you mean it")
    if options["mixed_modes"] not in ("true", "false"):
        raise UserError(f"mixed_modes={options['mixed_modes']}: choose true or false")
    return ResultsFolder(Path(options["results"])), options["mixed_modes"] == "true"


@command()
def main() -> None:
    """Judge and print one line a claim; exit 2 for bad input."""
    for one in judge(*arguments(__doc__)):
        print(
            f"{one.verdict:>17}  {one.id}: paper {one.paper_says}, here {one.ours_says or one.why}"
        )


if __name__ == "__main__":
    main()
