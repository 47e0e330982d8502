"""Live against replay, as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.run.console import Console
from experiments.validate.calibrate import write_testbed
from experiments.validate.validation import validate
from tests.command import config, run_module

LINE = {"base": 100.0, "per_token": 1.0}
DISTURBED_LINE = {**LINE, "after_wait": 10.0, "while_copying": 5.0}
DISTURBED = {"finemoe": DISTURBED_LINE, "on_demand": DISTURBED_LINE}
LINK = {"gb_s": 32.0, "time_scale": 0.001, "latency_us": 50.0, "wake_us": 50.0, "lag_us": 20.0}
TESTBED = {
    "_target_": "experiments.run.testbeds.calibrated",
    "name": "by hand",
    "model": "mixtral",
    "devices": 1,
    "link": LINK,
    "chunk_mb": 32.0,
    "resume_us": 100.0,
    "compute_us": {"start": LINE, "finish": LINE, "dense": DISTURBED, "expert": DISTURBED},
    "collect_us": {"finemoe": 10.0, "on_demand": 0.0},
    "prediction_us": {"finemoe": {"embeddings": 10.0, "gate": 10.0, "update": 10.0}},
}
OVERRIDES = (
    *(f"~system@systems.{n}" for n in ("moe_infinity", "promoe", "mixtral_offload", "deepspeed")),
    "budgets=[6]",
    "workload.prompts=3",
    "workload.output_tokens=3",
    "testbed.time_scale=0.001",
)
COMMAND = ("experiments.validate", *OVERRIDES)


def test_validate_compares_every_system_and_budget(tmp_path: Path) -> None:
    write_testbed(tmp_path / "mine.yaml", TESTBED)
    mine = f"calibration={tmp_path / 'mine.yaml'}"
    done = run_module(*COMMAND, f"output={tmp_path / 'out'}", mine, "repeats=3")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "validate.json").read_text())
    rows = record["comparisons"]
    assert [(row["system"], row["budget"]) for row in rows] == [("finemoe", 6), ("on_demand", 6)]
    for row in rows:
        live, again = row["live"], row["replay"]
        assert live["tpot_s"] == sorted(one["tpot_s"] for one in row["repeats"])[1]
        assert min(live["ttft_s"], live["tpot_s"], again["ttft_s"], again["tpot_s"]) > 0
        accesses = [sum(run[kind] for kind in ("hits", "late", "misses")) for run in (live, again)]
        assert accesses[0] == accesses[1] > 0
    # Without prefetch the order of transfers is the same, whatever they take.
    on_demand = rows[1]
    assert [on_demand["live"][k] for k in ("hits", "late", "misses")] == [
        on_demand["replay"][k] for k in ("hits", "late", "misses")
    ]
    assert {"git_commit", "machine", "testbed", "config"} <= record.keys()
    assert "on_demand" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["validate.json"]


def test_without_a_calibration_every_round_makes_one(tmp_path: Path) -> None:
    small = ("calibrate.workload.prompts=3", "calibrate.workload.output_tokens=3")
    budgets = "calibrate.memory_budgets=[6]"
    done = run_module(*COMMAND, "repeats=2", *small, budgets, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "validate.json").read_text())
    assert all(row["replay"]["tpot_s"] > 0 for row in record["comparisons"])
    testbed = record["testbed"]
    assert testbed["compute_us"]["dense"].keys() == {"resident", "finemoe", "on_demand"}
    assert min(testbed["link"]["wake_us"], testbed["link"]["lag_us"]) > 0
    assert OmegaConf.load(tmp_path / "testbed.yaml") == OmegaConf.create(testbed)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ("testbed.time_scale=0.5", "calibrated for links of 32.0 GB/s"),
        ("calibration=other.yaml", "is no file of experiments.validate.calibrate"),
        ("calibration=nowhere.yaml", "calibration=nowhere.yaml"),
        ("workload.output_tokens=1", "no TPOT below 2"),
        ("repeats=0", "repeats=0: serve live at least once"),
        ("testbed=h100 ~testbed.time_scale ~testbed.pinned", "use testbed=emulated"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    overrides: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_testbed(Path("mine.yaml"), TESTBED)
    Path("other.yaml").write_text("name: other\n")
    cfg = config("validate", *OVERRIDES, "calibration=mine.yaml", *overrides.split(), "output=out")
    with pytest.raises(UserError, match=cause):
        validate(cfg, Console())
