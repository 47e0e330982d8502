"""Live against replay, as a command."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.run.config import build
from experiments.run.console import Console
from experiments.validate.__main__ import validate
from experiments.validate.calibrate import write_testbed
from finemoe.testbed import SimulatedTestbed
from tests.command import config, run_module
from tests.engine import tiny

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
    *(
        "budgets=[1e-5]",
        "workload.prompts=3",
        "workload.output_tokens=3",
        "testbed.time_scale=0.001",
    ),
)
COMMAND = ("experiments.validate", *OVERRIDES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_validate_compares_every_system_and_budget(model: list[str], tmp_path: Path) -> None:
    write_testbed(tmp_path / "mine.yaml", TESTBED)
    mine = f"calibration={tmp_path / 'mine.yaml'}"
    words = [*model, f"output={tmp_path / 'out'}", mine, "repeats=3"]
    run_module(*COMMAND, *words).check_returncode()
    record = json.loads((tmp_path / "out" / "validate.json").read_text())
    rows = record["comparisons"]
    assert [(row["system"], row["budget"]) for row in rows] == [
        ("finemoe", 1e-5),
        ("on_demand", 1e-5),
    ]
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
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["validate.json"]


def test_without_a_calibration_every_round_makes_one(model: list[str], tmp_path: Path) -> None:
    small = ("calibrate.workload.prompts=3", "calibrate.workload.output_tokens=3")
    words = [*model, *small, "calibrate.memory_budgets=[1e-5]", f"output={tmp_path}", "repeats=2"]
    run_module(*COMMAND, *words).check_returncode()
    record = json.loads((tmp_path / "validate.json").read_text())
    assert all(row["replay"]["tpot_s"] > 0 for row in record["comparisons"])
    option: Any = OmegaConf.load(tmp_path / "testbed.yaml")
    assert option == OmegaConf.create(record["testbed"])
    check_testbed(build(option))


def check_testbed(testbed: SimulatedTestbed) -> None:
    rate, model = testbed.rate, OmegaConf.create({"name": "mixtral"})
    assert rate.bytes_per_second == 32e9 / testbed.time_scale == 32e9 / 0.001
    assert min(rate.latency, rate.wake, rate.lag) > 0
    systems = [OmegaConf.create({"label": one}) for one in ("finemoe", "on_demand", "oracle")]
    costs, others = (testbed.costs(model, one, True) for one in systems[:2])
    decode, prefill = costs.iteration([1], [40]), costs.iteration([40], [40])
    assert 0 < decode.dense <= prefill.dense
    assert 0 < costs.expert(1) <= costs.expert(40)
    assert costs.thread.resume > 0
    # On a busy machine one of them may well come out as nothing.
    thread = costs.thread
    extras = (*vars(thread.dense).values(), *vars(thread.expert).values())
    assert max(extras) > 0
    assert others.thread != thread
    assert costs.collect > others.collect == 0
    assert min(costs.prediction.embeddings, costs.prediction.gate, costs.prediction.update) > 0
    with pytest.raises(UserError, match="system=oracle; calibrate again"):
        testbed.costs(model, systems[2], True)
    with pytest.raises(UserError, match="with mixtral, not qwen"):
        testbed.costs(OmegaConf.create({"name": "qwen"}), systems[0], True)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ("testbed.time_scale=0.5", "calibrated for links of 32.0 GB/s"),
        ("calibration=other.yaml", "is no file of experiments.validate.calibrate"),
        ("workload.output_tokens=1", "no TPOT below 2"),
        ("repeats=0", "repeats=0: serve live at least once"),
    ],
)
def test_refusals(overrides: str, cause: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_testbed(Path("mine.yaml"), TESTBED)
    Path("other.yaml").write_text("name: other\n")
    cfg = config("validate", *OVERRIDES, "calibration=mine.yaml", overrides, "output=out")
    with pytest.raises(UserError, match=cause):
        validate(cfg, Console())
