"""The report says what the verdicts and records say, in one file that needs nothing else."""

import io
from pathlib import Path

import pytest
from PIL import Image

from experiments.judge.claims import Verdict
from experiments.judge.frame import IDS
from experiments.judge.report import system_table, write
from tests.experiments.judge.test_claims import Results

CAPTION = "Mode: simulated; 6 x RTX 3090; <scale> weights; 3 requests a run."


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """One figure drawn of two runs; its caption has what HTML must escape."""
    made = Results(tmp_path / "results")
    digests = [made.run("deepspeed", [1.0, 1.5, 2.0]), made.run("finemoe", [1.1, 1.4, 2.2])]
    made.experiment("10", *digests)
    figures = made.root / "figures"
    figures.mkdir()
    (figures / "10.png").write_bytes(dot())
    (figures / "10.txt").write_text(CAPTION + "\n")
    (figures / "10.csv").write_text("system,tpot_s\n" + "finemoe,1.23456789\n" * 61)
    return made


def dot() -> bytes:
    """Return a PNG of one black pixel."""
    drawn = io.BytesIO()
    Image.new("L", (1, 1)).save(drawn, "PNG")
    return drawn.getvalue()


def written(results: Results) -> tuple[list[Verdict], str, str]:
    """Write the report; return its verdicts, the page and the Markdown."""
    verdicts = write(results.folder)
    page, markdown = ((results.root / name).read_text() for name in ("report.html", "REPORT.md"))
    return verdicts, page, markdown


def test_both_say_every_claim_its_verdict_and_what_the_systems_did(results: Results) -> None:
    verdicts, page, markdown = written(results)
    assert {one.verdict for one in verdicts} >= {"does not hold", "not testable here"}
    for verdict in verdicts:
        row = page.split(f'<tr id="{verdict.id}">')[1].split("</tr>")[0]
        assert f">{verdict.verdict}</span>" in row
        assert verdict.paper_says in row
        assert verdict.ours_says in row
        assert f"| {verdict.text} `{verdict.id}` | **{verdict.verdict}** |" in markdown
        assert verdict.why in markdown
    table = system_table(results.folder.runs_of("10"))
    for row in [[*table], *table.to_numpy()]:
        assert f"| {' | '.join(row)} |\n" in markdown
    assert all(f"<td>{value}</td>" in page for value in table.iloc[0])


def test_figures_captions_and_data_are_there(results: Results) -> None:
    _, page, markdown = written(results)
    assert page.count("data:image/png;base64,") == 1
    assert CAPTION.replace("<", "&lt;").replace(">", "&gt;") in page
    assert CAPTION.replace("<", "&lt;") in markdown
    assert "![Figure 10](figures/10.png)" in markdown
    assert page.count("<td>1.235</td>") == 60
    for name in IDS:
        missing = f"python -m experiments.reproduce {name}"
        assert (f"Not made yet: `{missing}`." in markdown) == (name != "10")


def test_the_table_of_systems_sums_over_their_runs(results: Results) -> None:
    phases = {"on_demand_wait": 4.0, "prefetch_wait": 1.0, "search": 2.0, "update": 0.5}
    results.experiment(
        "10",
        results.run("promoe", hits=[8, 8, 8], summary={"phase_seconds": phases}),
        results.run("promoe", hits=[2, 2, 2], dataset="code", summary={"phase_seconds": phases}),
        results.run("finemoe", summary={"bytes_prefetched": 9_390_000_000_000, "bound": None}),
    )
    promoe, finemoe = system_table(results.folder.runs_of("10")).to_dict("records")
    # Two runs of 30 experts asked for and 10 s each; 3 requests each; bounds 8 and 2 s.
    assert tuple(promoe.values()) == (
        "ProMoE", "50.0", "10.0", "40.0", "1", "50.0", "2", "40.0", "10.0", "25.0", "80.0", "20.0",
    )  # fmt: skip
    # A large number has no exponent, and what no record has is left empty.
    assert (finemoe["ahead, GB"], finemoe["least loads, %"]) == ("3,130", "")
