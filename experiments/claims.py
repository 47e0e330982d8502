"""Judge the paper's claims from records: ``python -m experiments.claims results=<folder>``.

Every number comes from run records and analysis tables; `experiments/claims.yaml` says what the
paper claims, `RULES` says when a claim holds. Intervals are bootstrap intervals
(`experiments/resampling.py`). Writes `<results>/claims.json` and `<results>/claims.csv`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from experiments.errors import UserError, command, words_given
from experiments.evidence import Evidence, Run
from experiments.explanations import explain
from experiments.figures.style import model_name
from experiments.measuring import (
    Cell,
    Claim,
    Finding,
    Untestable,
    cell_name,
    measure,
    run_draws,
)
from experiments.resampling import interval
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
    paper: float | None
    ours: float | None
    low: float | None
    high: float | None
    unit: str
    paper_says: str
    ours_says: str
    measured: str
    """What `ours` is: a mean over cells, the least margin, the worst cell."""
    bound: str
    """What the bound or an oracle would reach, where records say so."""
    mode: str
    testbed: str
    weights: str
    requests: int
    cells: tuple[str, ...]
    paired: bool
    digests: tuple[str, ...]
    why: str
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
        where = {**entry.get("where", {}), "model": model}
        shown = _number(paper, str(entry.get("unit", "")), digits=6)
        text = entry["text"].format(model=model_name(model), paper=shown)
        own = {"id": f"{entry['id']}-{model}", "paper": paper, "where": where, "text": text}
        claims.append(Claim(**{**plain, **own}))
    return claims


# Judging ------------------------------------------------------------------------------------------


def judge(results: Path, mixed_modes: bool = False) -> list[Verdict]:
    """Judge every claim, write claims.json and claims.csv into `results`, return the verdicts.

    A claim over records of several modes is judged only with `mixed_modes`, and marked. Raises
    UserError if the folder is missing, unreadable or cannot be written to.
    """
    evidence = Evidence(results)
    verdicts = [judge_one(claim, evidence, mixed_modes) for claim in load_claims()]
    _write(results, verdicts)
    return verdicts


def judge_one(claim: Claim, evidence: Evidence, mixed_modes: bool = False) -> Verdict:
    """Return the verdict on one claim."""
    try:
        finding = measure(claim, evidence)
        modes = sorted({run.record["mode"] for run in finding.runs})
        if len(modes) > 1 and not mixed_modes:
            raise Untestable(
                f"its records mix the modes {', '.join(modes)}: judge one mode, or ask for "
                "mixed_modes=true"
            )
        if not np.isfinite(finding.draws[0]):
            raise Untestable(f"{finding.label}: not a finite number, as a baseline's value is 0")
    except Untestable as reason:
        return _untestable(claim, str(reason))
    return _verdict(claim, finding, evidence)


def decide(claim: Claim, finding: Finding) -> str:
    """Return holds, holds weaker or does not hold, by `RULES`."""
    ours, (low, high) = float(finding.draws[0]), _limits(finding.draws)
    if claim.kind in ("reduction", "increase"):
        assert claim.paper is not None
        return FAILS if low <= 0 else HOLDS if high >= claim.paper else WEAKER
    if claim.kind == "order":
        clear = all(_limits(draws)[0] > 0 for draws in finding.comparisons().values())
        everywhere = all(part.draws[0] > 0 for part in finding.parts)
        return FAILS if not clear else HOLDS if everywhere else WEAKER
    if claim.kind == "trend" and claim.flat_after is not None:
        rise = next(iter(finding.comparisons().values()))
        if _limits(rise)[0] <= 0 or high >= 1:
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


def _limits(draws: Any) -> tuple[float, float]:
    """Return the 95 % interval; where nothing varied, the estimate itself."""
    found = interval(draws)
    return found if found is not None else (float(draws[0]), float(draws[0]))


# What a verdict says ------------------------------------------------------------------------------


def _verdict(claim: Claim, finding: Finding, evidence: Evidence) -> Verdict:
    decided = decide(claim, finding)
    limits, unit = interval(finding.draws), _unit(claim)
    scale = _SCALES.get(unit, 1.0)
    ours = float(finding.draws[0])
    says = _number(ours, unit)
    says += f" ({_range(*limits, unit)})" if limits else " (no interval)"
    why = "" if decided == HOLDS else explain(claim, finding)
    return Verdict(
        **_said(claim),
        verdict=decided,
        ours=ours * scale,
        low=limits[0] * scale if limits else None,
        high=limits[1] * scale if limits else None,
        ours_says=says,
        measured=finding.label,
        bound=_bound(claim, finding, evidence),
        mode=" + ".join(sorted({run.record["mode"] for run in finding.runs} or
                               {table.mode for table in finding.tables})),
        testbed=_joined(finding.runs, "testbed"),
        weights=_weights(claim, finding, evidence),
        requests=sum(len(run.requests) for run in _subjects(claim, finding)),
        cells=tuple(cell_name(cell) for cell in finding.cells),
        paired=finding.paired,
        digests=_digests(finding),
        why=why,
    )  # fmt: skip


def _untestable(claim: Claim, reason: str) -> Verdict:
    nothing: dict[str, Any] = dict.fromkeys(("ours", "low", "high"))
    empty: dict[str, Any] = dict.fromkeys(
        ("ours_says", "measured", "bound", "mode", "testbed", "weights"), ""
    )
    return Verdict(
        **_said(claim), verdict=UNTESTABLE, **nothing, **empty, requests=0, cells=(), paired=True,
        digests=(), why=reason,
    )  # fmt: skip


def _said(claim: Claim) -> dict[str, Any]:
    unit = _unit(claim)
    names = ("id", "section", "experiment", "kind", "text")
    limit = claim.at_most if claim.at_most is not None else claim.at_least
    paper = claim.paper if claim.paper is not None else limit
    return {
        **{name: getattr(claim, name) for name in names},
        "paper": None if paper is None else paper * _SCALES.get(unit, 1.0),
        "unit": unit,
        "paper_says": _paper(claim, unit),
    }


def _paper(claim: Claim, unit: str) -> str:
    if claim.kind in ("order", "trend"):
        return claim.direction or "flat" if claim.kind == "trend" else "every margin above 0"
    if claim.at_most is not None:
        return f"at most {_number(claim.at_most, unit, digits=6)}"
    if claim.at_least is not None:
        return f"at least {_number(claim.at_least, unit, digits=6)}"
    return _number(claim.paper or 0.0, unit, digits=6)


_SCALES = {"%": 100.0, "ms": 1000.0}
"""What values, in fractions and seconds, are multiplied by for a unit."""


def _unit(claim: Claim) -> str:
    return claim.unit or ("%" if claim.kind in ("reduction", "increase", "order") else "")


def _number(value: float, unit: str, digits: int = 3) -> str:
    return f"{_plain(value * _SCALES.get(unit, 1.0), digits)} {unit}".strip()


def _range(low: float, high: float, unit: str) -> str:
    scale = _SCALES.get(unit, 1.0)
    return f"{_plain(low * scale)} to {_plain(high * scale)}"


def _plain(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, never with an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:.{min(decimals, 3)}f}"
    return text.rstrip("0").rstrip(".") if digits > 3 and "." in text else text


def _subjects(claim: Claim, finding: Finding) -> list[Run]:
    """Return the runs of the claim's subject, or all if it ranks without one."""
    chosen = claim.subject if isinstance(claim.subject, Mapping) else {"system": claim.subject}
    mine = [run for run in finding.runs if run.matches(chosen)]
    return list(finding.runs) if claim.ranking else mine


def _digests(finding: Finding) -> tuple[str, ...]:
    found = [run.digest for run in finding.runs] + [table.digest for table in finding.tables]
    return tuple(sorted(found))


def _joined(runs: Sequence[Run], name: str) -> str:
    return ", ".join(sorted({str(run.record[name]) for run in runs}))


def _weights(claim: Claim, finding: Finding, evidence: Evidence) -> str:
    if finding.runs:
        return _joined(finding.runs, "weights")
    subjects = evidence.analysis_record(claim.experiment).get("subjects", ())
    return ", ".join(sorted({str(one.get("weights", "")) for one in subjects}))


def _bound(claim: Claim, finding: Finding, evidence: Evidence) -> str:
    """Say how far the subject's runs are from their bound, and what an oracle reached instead."""
    said = []
    times = [
        bound["times"]
        for run in _subjects(claim, finding)
        if (bound := run.summary.get("bound")) and bound["times"] >= 1
    ]
    if times and not claim.ranking:
        said.append(f"FineMoE takes {np.mean(times):.2f} times the least possible time")
    if claim.kind in ("reduction", "increase"):
        others = {cell: _oracles(cell, claim, evidence) for cell in finding.cells}
        if all(others.values()):
            said.append(_with_oracle(claim, finding, others))
    return "; ".join(said)


def _oracles(cell: Cell, claim: Claim, evidence: Evidence) -> list[Run]:
    runs = [run for run in evidence.runs(claim.experiment) if run.matches(claim.where)]
    return [run for run in runs if run.cell == cell[:2] and run.matches({"system": "oracle"})]


def _with_oracle(claim: Claim, finding: Finding, oracles: Mapping[Cell, Sequence[Run]]) -> str:
    sign = 1.0 if claim.kind == "increase" else -1.0
    changes = []
    for cell, (oracle, *_) in oracles.items():
        for metric in claim.metric:
            best = run_draws(oracle, metric)[0]
            for run in finding.runs:
                if run.cell == cell[:2] and any(
                    run.matches({"system": one}) for one in claim.against
                ):
                    changes.append(sign * (best / run_draws(run, metric)[0] - 1))
    return f"an oracle reaches {_number(float(np.mean(changes)), '%')}"


# Files and command --------------------------------------------------------------------------------


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return one row a claim."""
    frame = pd.DataFrame([asdict(one) for one in verdicts])
    for name in ("cells", "digests"):
        frame[name] = frame[name].map("; ".join)
    return frame


def _write(results: Path, verdicts: Sequence[Verdict]) -> None:
    content = {"rules": RULES, "claims": [asdict(one) for one in verdicts]}
    write_text(results / "claims.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_text(results / "claims.csv", table(verdicts).to_csv(index=False))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raise UserError if it cannot be written."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(text)
    except OSError as error:
        cause = f"cannot write to {path.parent}: {error.strerror}"
        raise UserError(f"{cause}; choose another results=") from error


def arguments(doc: str | None) -> tuple[Path, bool]:
    """Return the results folder and mixed_modes from `key=value` words; UserError for others."""
    options, others = words_given(doc, {"results": "results", "mixed_modes": "false"})
    if others:
        raise UserError(f"{others[0]}: give results=<folder>, and mixed_modes=true if you mean it")
    if options["mixed_modes"] not in ("true", "false"):
        raise UserError(f"mixed_modes={options['mixed_modes']}: choose true or false")
    return Path(options["results"]), options["mixed_modes"] == "true"


@command()
def main() -> None:
    """Judge and print one line a claim; exit 2 for bad input."""
    for one in judge(*arguments(__doc__)):
        print(
            f"{one.verdict:>17}  {one.id}: paper {one.paper_says}, here {one.ours_says or one.why}"
        )


if __name__ == "__main__":
    main()
