"""From times taken live to the costs of a testbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.run.config import build
from experiments.run.console import Console
from experiments.validate import calibrate
from experiments.validate.calibrate import fit
from experiments.validate.probe import Sample
from finemoe.testbed import SimulatedTestbed
from tests.command import config

OTHERS = ("moe_infinity", "promoe", "mixtral_offload", "deepspeed", "belady", "oracle")


micros = st.floats(1.0, 1000.0)


@given(base=micros, per_token=micros, per_context=st.floats(0.1, 10.0))
def test_a_line_is_found_again(base: float, per_token: float, per_context: float) -> None:
    places = [(1, 10), (1, 100), (8, 8), (40, 40), (128, 128)]
    samples = [Sample(t, c, (base + per_token * t + per_context * c) * 1e-6) for t, c in places * 2]
    line = fit(samples, ("per_context",))
    for tokens, context in places:
        seconds = line["base"] + line["per_token"] * tokens + line["per_context"] * context
        assert seconds == pytest.approx(base + per_token * tokens + per_context * context, rel=1e-3)


def test_costs_are_never_negative_and_leave_out_what_is_not_asked_for() -> None:
    line = fit([Sample(1, 5, 10e-6), Sample(2, 9, 8e-6), Sample(3, 1, 6e-6)], ())
    assert line.keys() == {"base", "per_token"}
    assert line["per_token"] == 0
    assert 6 < line["base"] < 10


def test_waits_and_copies_are_told_apart() -> None:
    samples = [
        Sample(tokens, 0, (100 + 2 * tokens + 50 * waited + 30 * copying) * 1e-6, waited, copying)
        for tokens in (1, 9)
        for waited, copying in ((False, False), (True, False), (True, True))
    ]
    assert fit(samples, ("after_wait", "while_copying")) == pytest.approx(
        {"base": 100, "per_token": 2, "after_wait": 50, "while_copying": 30}
    )


def test_a_thread_that_lost_its_core_is_left_out() -> None:
    line = fit([Sample(1, 0, seconds) for seconds in (1e-4, 1e-4, 2e-4, 3e-3)], ())
    assert line["base"] + line["per_token"] == pytest.approx(400 / 3)


def calibrating(*overrides: str) -> DictConfig:
    small = ("workload.prompts=4", "workload.output_tokens=3", "testbed.time_scale=0.001")
    dropped = [f"~system@systems.{name}" for name in OTHERS]
    return config("calibrate", *small, *dropped, *overrides)


def test_a_calibration_becomes_a_testbed(tmp_path: Path) -> None:
    cfg = calibrating("dataset=docs")
    path = tmp_path / "mine.yaml"
    calibrate.write_testbed(path, calibrate.calibrate(cfg, Console()))
    assert not list(tmp_path.glob("*.partial"))
    testbed = build(OmegaConf.load(path))  # type: ignore[arg-type]
    assert isinstance(testbed, SimulatedTestbed)
    assert testbed.rate.bytes_per_second == 32e9 / 0.001
    assert testbed.time_scale == 0.001
    assert testbed.rate.latency == pytest.approx(10e-6 * 0.001)
    assert testbed.rate.wake > 0
    costs = testbed.costs(cfg.model, OmegaConf.create({"label": "finemoe"}), True)
    decode, prefill = costs.iteration([1], [40]), costs.iteration([40], [40])
    assert 0 < decode.dense <= prefill.dense
    assert 0 < costs.expert(1) <= costs.expert(40)
    assert costs.thread.resume > 0
    assert costs.thread.dense.after_wait + costs.thread.dense.while_copying > 0
    assert (
        testbed.costs(cfg.model, OmegaConf.create({"label": "on_demand"}), True).thread.dense
        != costs.thread.dense
    )
    assert costs.collect > 0
    assert min(costs.prediction.embeddings, costs.prediction.gate, costs.prediction.update) > 0
    assert testbed.costs(cfg.model, OmegaConf.create({"label": "on_demand"}), True).collect == 0
    with pytest.raises(UserError, match="system=oracle; calibrate again"):
        testbed.costs(cfg.model, OmegaConf.create({"label": "oracle"}), True)
    with pytest.raises(UserError, match="with mixtral, not qwen"):
        testbed.costs(
            OmegaConf.create({"name": "qwen"}), OmegaConf.create({"label": "finemoe"}), True
        )


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ("testbed.devices=2", "one device"),
        ("testbed=h100 ~testbed.time_scale ~testbed.pinned", "use testbed=emulated"),
    ],
)
def test_only_one_emulated_device_is_calibrated(overrides: str, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        calibrate.calibrate(calibrating(*overrides.split()), Console())
