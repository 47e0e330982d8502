"""Verdicts on made-up records whose answers are worked out by hand."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.bootstrap import interval, request_draws
from experiments.errors import UserError
from experiments.judge import claims
from experiments.judge.claims import FAILS, HOLDS, UNTESTABLE, WEAKER, judge, load_claims
from experiments.judge.frame import ResultsFolder
from experiments.judge.report import write
from tests.command import refusal, run_module
from tests.experiments.judge.test_frame import PROVENANCE, leave_run

BASELINES = ("deepspeed", "mixtral_offload", "promoe", "moe_infinity")


class Results:
    """A results folder that a test fills."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    @property
    def folder(self) -> ResultsFolder:
        return ResultsFolder(self.root)

    def run(
        self,
        system: str,
        tpots: Sequence[float] = (0.2, 0.3, 0.4),
        hits: Sequence[int] = (5, 5, 5),
        *options: str,
        mode: str = "simulated",
        budget_gb: float = 6.0,
        **summary: Any,
    ) -> str:
        """Write one run whose requests ask for ten experts each; return its digest."""
        words = (f"system={system}", f"memory_budget={budget_gb}", *options)
        identity = repr((words, tpots, hits, mode, summary)).encode()
        folder = self.root / "runs" / hashlib.sha256(identity).hexdigest()
        facts: dict[str, Any] = {"tpots": tpots, "hits": hits, "mode": mode, "budget_gb": budget_gb}
        leave_run(folder, *words, **facts, **summary)
        return folder.name

    def against(
        self, name: str, mine: Sequence[float], theirs: Sequence[float], *others: str
    ) -> None:
        """Write an experiment in which FineMoE takes `mine` and each other system `theirs`."""
        made = [self.run(one, theirs) for one in others]
        self.experiment(name, self.run("finemoe", mine), *made)

    def experiment(self, name: str, *digests: str) -> None:
        folder = self.root / "experiments"
        folder.mkdir(exist_ok=True)
        content = {"id": name, "title": "a title", "kind": "runs", "runs": digests}
        (folder / f"{name}.json").write_text(json.dumps(content))

    def analysis(self, name: str, **tables: pd.DataFrame) -> None:
        folder = self.root / "analysis" / name
        folder.mkdir(parents=True, exist_ok=True)
        for stem, rows in tables.items():
            rows.to_csv(folder / f"{stem}.csv", index=False)
        record: dict[str, Any] = {"subjects": [], "tables": [*tables], "provenance": PROVENANCE}
        record |= {"id": name, "label": "a label", "title": "a title", "mode": "analysis"}
        (folder / "record.json").write_text(json.dumps(record))

    def verdict(self, name: str, **options: Any) -> Any:
        (claim,) = [one for one in load_claims() if one.id == name]
        return claims.judge_one(claim, self.folder.rows, **options)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "results")


def test_same_requests_are_drawn_alike() -> None:
    base = pd.DataFrame({"request": range(4), "batch": range(4), "tpot_s": [1.0, 2.0, 4.0, 8.0]})
    half = base.assign(tpot_s=base["tpot_s"] / 2)
    low, high = (request_draws(one, "tpot_s", "docs") for one in (half, base))
    assert interval(high) is not None
    assert interval(low / high) is None, "paired: half of each request is half of every resample"
    other = request_draws(base, "tpot_s", "code")
    assert interval(low / other) is not None, "another dataset's requests are other requests"


def test_interval_of_a_mean_is_that_of_the_bootstrap() -> None:
    # 0 or 1 with equal chance, 400 requests: 1.96 * 0.5 / 20 = 0.049 on either side of the mean.
    rows = pd.DataFrame({"request": range(400), "batch": range(400), "ttft_s": [0.0, 1.0] * 200})
    ends = interval(request_draws(rows, "ttft_s", "docs"))
    assert ends == pytest.approx((0.451, 0.549), abs=0.006)


def test_hit_rate_is_the_ratio_of_sums_and_a_quantile_is_an_observation() -> None:
    rows = pd.DataFrame(
        {"request": [0, 1], "batch": [0, 1], "hits": [1, 9], "late": [0, 3], "misses": [1, 6],
         "e2el_s": [1.0, 3.0]}
    )  # fmt: skip
    assert request_draws(rows, "hit_rate", "docs")[0] == 10 / 20
    assert request_draws(rows, "e2el_s@0.5", "docs")[0] == 1.0
    assert request_draws(rows, "e2el_s@0.9", "docs")[0] == 3.0


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.5, HOLDS), (0.54, HOLDS), (0.7, WEAKER), (1.0, FAILS), (1.2, FAILS)]
)
def test_reduction(results: Results, ours: float, verdict: str) -> None:
    """The paper says 46 %; each request takes `ours` of its time, so nothing varies."""
    results.against("10", (ours, 2 * ours, 4 * ours), (1.0, 2.0, 4.0), "deepspeed")
    judged = results.verdict("fig10-tpot-deepspeed")
    assert (judged.verdict, judged.ours) == (verdict, pytest.approx(100 * (1 - ours)))
    assert (judged.paper, judged.unit, judged.requests, judged.paired) == (46.0, "%", 3, True)
    assert judged.digests == tuple(sorted(path.name for path in (results.root / "runs").iterdir()))
    assert bool(judged.why) == (verdict != HOLDS)


def test_means_over_cells(results: Results) -> None:
    # TPOT falls by 60 % on one model and by 40 % on another, whose requests take ten times as long.
    # Hit rates rise from 50 to 60 and from 10 to 20 %: 10 points over a mean of 30 % are a third.
    for model, base, mine, hits in (("mixtral", 1.0, 0.4, 5), ("qwen", 10.0, 6.0, 1)):
        results.run("promoe", [base] * 3, [hits] * 3, f"model={model}")
        results.run("finemoe", [mine] * 3, [hits + 1] * 3, f"model={model}")
    results.experiment("10", *[path.name for path in (results.root / "runs").iterdir()])
    judged = results.verdict("fig10-tpot-promoe")
    assert judged.ours == pytest.approx(50)
    assert (judged.low, judged.high) == (pytest.approx(40), pytest.approx(60))
    assert judged.cells == ("Mixtral-8x7B, docs", "Qwen1.5-MoE, docs")
    judged = results.verdict("fig10-hits-promoe")
    assert (judged.ours, judged.verdict) == (pytest.approx(100 / 3), WEAKER)


@pytest.mark.parametrize(
    ("usual", "first", "verdict", "least"),
    [
        # Margins 2 * 1 / 7 and 2 * 1 / 9, of which the least is reported.
        ((3, 4, 5), (3, 4, 5), HOLDS, 200 / 9),
        ((3, 5, 4), (3, 5, 4), FAILS, -200 / 9),
        ((3, 4, 4), (3, 4, 4), FAILS, 0),
        # One of six datasets disagrees.
        ((2, 5, 8), (2, 5, 5), WEAKER, 5 / 6 * 600 / 13),
    ],
)
def test_order(results: Results, usual: Any, first: Any, verdict: str, least: float) -> None:
    made = [
        results.run(
            "finemoe", (1, 2, 3), [count] * 3, f"dataset.name=d{n}", f"system.eviction={one}"
        )
        for n in range(6)
        for one, count in zip(("lru", "lfu", "finemoe"), usual if n else first, strict=True)
    ]
    results.experiment("14b", *made)
    judged = results.verdict("fig14b-caching")
    assert (judged.verdict, judged.ours) == (verdict, pytest.approx(least))
    if verdict == WEAKER:
        assert "In 1 of 12 single cells it is the other way round or equal: 0 %" in judged.why


CELL = {"model": "mixtral", "dataset": "docs"}
ANALYSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fig3a-structure": ("3a", "heatmaps", {"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1]}),
    "fig4-falls": ("4", "hit_rates", {"granularity": "fine", "distance": range(5)}),
    "fig9-pearson": ("9", "pearson", {"method": "pairs", "search": "semantic"}),
    "fig16a-plateau": ("16a", "capacity", {"search": "semantic", "capacity": [500, 1000, 1500]}),
    "table1-inactive-share-mixtral": ("table1", "models", {}),
    "table1-inactive-share-qwen": ("table1", "models", {}),
}
EVEN, SHARP = [0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.2, 0.8]
FALLING = np.linspace(0.9, 0.5, 5)


@pytest.mark.parametrize(
    ("name", "measured", "verdict"),
    [
        # Blurred heatmaps have the higher entropy.
        ("fig3a-structure", {"coarse": EVEN, "fine": SHARP}, HOLDS),
        ("fig3a-structure", {"coarse": SHARP, "fine": EVEN}, FAILS),
        ("fig4-falls", {"hit_rate": FALLING}, HOLDS),
        ("fig4-falls", {"hit_rate": FALLING[::-1]}, FAILS),
        # Ranks 1 3 2 5 4 upside down: rho = 1 - 6 * 4 / (5 * 24) = 0.8 holds; 1 3 4 2 5: 0.7.
        ("fig4-falls", {"hit_rate": [0.5, 0.3, 0.4, 0.1, 0.2]}, HOLDS),
        ("fig4-falls", {"hit_rate": [0.5, 0.3, 0.2, 0.4, 0.1]}, WEAKER),
        # Wide intervals of points that share requests do not shuffle a trend.
        ("fig4-falls", {"hit_rate": FALLING, "low": FALLING - 1, "high": FALLING + 1}, HOLDS),
        # At least 0.5; weaker if the interval excludes 0.
        ("fig9-pearson", {"pearson": 0.8, "low": 0.7, "high": 0.9}, HOLDS),
        ("fig9-pearson", {"pearson": 0.6, "low": 0.3, "high": 0.9}, WEAKER),
        ("fig9-pearson", {"pearson": 0.1, "low": -0.1, "high": 0.3}, FAILS),
        # Slopes up to and beyond 1,000, equally far apart: 0.1, 0.5 and 1 of the first.
        ("fig16a-plateau", {"score": [0.0, 1.0, 1.1]}, HOLDS),
        ("fig16a-plateau", {"score": [0.0, 1.0, 1.5]}, WEAKER),
        ("fig16a-plateau", {"score": [0.0, 1.0, 2.0]}, FAILS),
        # The paper says 72 %.
        ("table1-inactive-share-mixtral", {"inactive_share": 0.724}, HOLDS),
        ("table1-inactive-share-mixtral", {"inactive_share": 0.5}, FAILS),
        ("table1-inactive-share-qwen", {"inactive_share": 0.8}, UNTESTABLE),
    ],
)
def test_analyses(results: Results, name: str, measured: dict[str, Any], verdict: str) -> None:
    experiment, csv, keys = ANALYSES[name]
    rows = max(np.size(one) for one in [*keys.values(), *measured.values()])
    table = pd.DataFrame({**CELL, **keys, **measured}, index=range(rows))
    results.analysis(experiment, **{csv: table})
    judged = results.verdict(name)
    assert judged.verdict == verdict
    if name == "fig9-pearson":
        said = [judged.ours, judged.low, judged.high]
        assert said == pytest.approx([*measured.values()], abs=0.02)
    elif name == "fig4-falls":
        assert (judged.mode, judged.low) == ("analysis", None)
    elif name == "table1-inactive-share-mixtral":
        assert judged.ours == pytest.approx(100 * measured["inactive_share"])


def test_overhead_is_over_iterations_and_time(results: Results) -> None:
    # Three requests of five tokens: 0.3 s over 15 iterations are 20 ms, over 10 s they are 3 %.
    phases = {"context_collection": 0.2, "prefetch_wait": 0.1, "on_demand_wait": 4.0}
    results.experiment("17", results.run("finemoe", phase_seconds=phases))
    for name, ours, verdict in (("fig17-overhead", 20, HOLDS), ("fig17-share", 3, FAILS)):
        judged = results.verdict(name)
        assert (judged.ours, judged.verdict) == (pytest.approx(ours), verdict)


def test_nothing_there_is_not_testable(results: Results) -> None:
    verdicts = judge(results.folder)
    assert {one.verdict for one in verdicts} == {UNTESTABLE}
    assert len(json.loads((results.root / "claims.json").read_text())["claims"]) == len(verdicts)
    assert len(pd.read_csv(results.root / "claims.csv")) == len(verdicts)


def test_records_that_decide_nothing(results: Results) -> None:
    def why(name: str, *digests: str) -> str:
        results.experiment("10", *digests)
        judged = results.verdict(name)
        assert judged.verdict == UNTESTABLE
        return str(judged.why)

    mine = results.run("finemoe")
    assert why("fig10-tpot-deepspeed", mine).startswith("no record of DeepSpeed on ")
    made = [results.run("deepspeed"), mine, results.run("finemoe", budget_gb=12)]
    assert why("fig10-tpot-deepspeed", *made).startswith("2 records of FineMoE on ")
    none = results.run("promoe", hits=[0] * 3)
    assert "not a finite number" in why("fig10-hits-promoe", none, mine)
    results.analysis("16a", capacity=pd.DataFrame({"capacity": [1], "model": ["a"]}))
    assert results.verdict("fig16a-plateau").why == "its records have no 'search'"


def test_mixed_modes_are_refused_unless_asked_for(results: Results) -> None:
    made = [results.run("deepspeed", [1.0] * 3, mode="emulated"), results.run("finemoe", [0.5] * 3)]
    results.experiment("10", *made)
    refused = results.verdict("fig10-tpot-deepspeed")
    assert refused.verdict == UNTESTABLE
    assert "emulated, simulated" in refused.why
    judged = results.verdict("fig10-tpot-deepspeed", mixed_modes=True)
    assert (judged.verdict, judged.mode) == (HOLDS, "emulated + simulated")


OWN = '''
from experiments.judge.findings import claim, lowest, reductions

@claim("order", "traces", "My thesis")
def fine_first(rows):
    """Fine is below coarse."""
    return lowest(rows, ["nats"], [{"granularity": "fine"}, {"granularity": "coarse"}])

@claim("reduction", "mine", "My thesis", paper={"promoe": 0.4})
def cheaper(rows, system):
    """TPOT of {system} is {paper} lower."""
    return reductions(rows, ["tpot_s"], [system, "finemoe"])
'''


def test_a_claim_is_a_function_in_a_file_of_ones_own(results: Results, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    results.against("mine", [1.0] * 3, [0.5] * 3, "promoe")
    rows = {"model": "phi", "granularity": ["fine", "coarse"], "nats": [2.0, 1.0]}
    results.analysis("traces", entropy=pd.DataFrame(rows))
    *_, order, judged = write(results.folder, claims=tmp_path / "own.py")
    assert (order.id, order.verdict, order.bound) == ("fine-first", FAILS, "")
    assert (judged.id, judged.verdict, judged.paper) == ("cheaper-promoe", HOLDS, 40)
    assert judged.ours == pytest.approx(50)
    assert f"`{judged.id}` | **holds** |" in (results.root / "REPORT.md").read_text()
    (tmp_path / "own.py").write_text(OWN.replace("cheaper", "fig10_tpot"))
    with pytest.raises(UserError, match="several claims are called fig10-tpot-promoe"):
        load_claims(tmp_path / "own.py")


def test_command_line(results: Results) -> None:
    folder, command = f"results={results.root}", "experiments.judge.claims"
    results.against("10", [0.5] * 3, [1.0] * 3, "deepspeed")
    assert (
        "holds  fig10-tpot-deepspeed: paper 46 %, here 50.0 %" in run_module(command, folder).stdout
    )
    for word in ("reuslts=x", "mixed_modes=maybe", "claims=/no/file"):
        refusal(run_module(command, folder, word))
