"""The report says what the verdicts and records say, in one file that needs nothing else."""

from pathlib import Path

from PIL import Image

from experiments.judge.frame import IDS
from experiments.judge.report import system_table, write
from tests.experiments.judge.test_claims import Results


def test_both_say_every_verdict_and_show_every_figure_that_is_there(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    results.against("10", [1.1, 1.4, 2.2], [1.0, 1.5, 2.0], "deepspeed")
    figures = results.root / "figures"
    figures.mkdir()
    Image.new("L", (1, 1)).save(figures / "10.png")
    (figures / "10.txt").write_text("Mode: simulated; <scale> weights.\n")
    verdicts = write(results.folder)
    page, markdown = ((results.root / name).read_text() for name in ("report.html", "REPORT.md"))
    assert {one.verdict for one in verdicts} >= {"does not hold", "not testable here"}
    for verdict in verdicts:
        row = page.split(f'<tr id="{verdict.id}">')[1].split("</tr>")[0]
        assert f">{verdict.verdict}</span>" in row
        assert f"| {verdict.text} `{verdict.id}` | **{verdict.verdict}** |" in markdown
    for cells in system_table(results.folder.runs_of("10")).to_numpy():
        assert f"| {' | '.join(cells)} |\n" in markdown
        assert all(f"<td>{value}</td>" in page for value in cells)
    assert page.count("data:image/png;base64,") == 1
    assert "&lt;scale&gt; weights" in page
    for name in IDS:
        missing = f"Not made yet: `python -m experiments.reproduce {name}`."
        assert (missing in markdown) == (name != "10")


def test_the_table_of_systems_sums_over_their_runs(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    phases = {"on_demand_wait": 4.0, "prefetch_wait": 1.0, "search": 2.0, "update": 0.5}
    results.experiment(
        "10",
        results.run("promoe", hits=[8, 8, 8], phase_seconds=phases),
        results.run("promoe", (2, 3, 4), [2, 2, 2], "dataset=code", phase_seconds=phases),
        results.run("finemoe", bytes_prefetched=9_390_000_000_000, bound=None),
    )
    promoe, finemoe = system_table(results.folder.runs_of("10")).to_dict("records")
    # Two runs of 30 experts asked for and 10 s each; 3 requests each; bounds 8 and 2 s.
    assert tuple(promoe.values()) == (
        "ProMoE", "50.0", "10.0", "40.0", "1", "50.0", "2", "40.0", "10.0", "25.0", "80.0", "20.0",
    )  # fmt: skip
    # A large number has no exponent, and what no record has is left empty.
    assert (finemoe["ahead, GB"], finemoe["least loads, %"]) == ("3,130", "")
