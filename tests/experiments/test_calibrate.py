"""From times taken live to the costs of a testbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from experiments import calibrate
from experiments.calibrate import Probe, Sample, Span, added_wait, collecting, fitted, predicting
from experiments.console import Console
from experiments.errors import UserError
from experiments.setup import build
from finemoe.offload.policy import Iteration, LayerOutcome
from finemoe.offload.routed import RoutedStep
from finemoe.testbed import SimulatedTestbed
from finemoe.trace import TracedRequest
from tests.command import ROOT

OTHERS = ("moe_infinity", "promoe", "mixtral_offload", "deepspeed", "belady", "oracle")
PREFILL = Iteration(0, "prefill", (7,), (3,))
DECODES = [Iteration(number, "decode", (7,), (1,)) for number in (1, 2)]


def step(tokens: int, counts: list[list[int]]) -> RoutedStep:
    return RoutedStep(tokens, np.array(counts), None, None, None)


def hit(iteration: Iteration, layer: int, *experts: int) -> LayerOutcome:
    return LayerOutcome(iteration, layer, experts, (), ())


def test_an_iteration_is_split_at_its_gates_and_experts() -> None:
    # Two layers of two experts; the prefill begins at 10, its gates ask at 14 and 20.
    traced = {7: TracedRequest(7, (1, 2, 3), (4, 5), (step(3, [[2, 1], [0, 3]]),))}
    probe = Probe(
        begins=[(PREFILL, 10.0), (DECODES[0], 26.0)],
        gates=[(hit(PREFILL, 0, 0, 1), 14.0), (hit(PREFILL, 1, 1), 20.0)],
        spans=[
            Span("device 0", 14.5, 16.0),
            Span("search", 15.0, 19.0),
            Span("device 0", 16.0, 17.0),
            Span("device 0", 20.0, 25.0),
        ],
    )
    samples = calibrate.compute_samples(probe, traced, layers=2)
    assert samples == {
        "expert": [Sample(2, 0, 2.0), Sample(1, 0, 1.0), Sample(3, 0, 5.0)],
        "dense": [Sample(3, 3, 3.0)],
        "start": [Sample(3, 3, 1.0)],
        "finish": [Sample(3, 3, 1.0)],
    }


micros = st.floats(1.0, 1000.0)


@given(base=micros, per_token=micros, per_context=st.floats(0.1, 10.0))
def test_a_line_is_found_again(base: float, per_token: float, per_context: float) -> None:
    places = [(1, 10), (1, 100), (8, 8), (40, 40), (128, 128)]
    samples = [Sample(t, c, (base + per_token * t + per_context * c) * 1e-6) for t, c in places * 2]
    line = fitted(samples, context=True)
    for tokens, context in places:
        seconds = line["base"] + line["per_token"] * tokens + line["per_context"] * context
        assert seconds == pytest.approx(base + per_token * tokens + per_context * context, rel=1e-3)


def test_costs_are_never_negative_and_leave_out_what_is_not_asked_for() -> None:
    falling = [Sample(1, 5, 10e-6), Sample(2, 9, 8e-6), Sample(3, 1, 6e-6)]
    line = fitted(falling, context=False)
    assert line.keys() == {"base", "per_token"}
    assert line["per_token"] == 0
    assert 6 < line["base"] < 10


def test_each_load_bears_its_share_of_the_wait() -> None:
    decode = DECODES[0]
    missed = LayerOutcome(decode, 0, (), (), (0, 1))
    half = LayerOutcome(decode, 1, (0,), (), (1,))
    spans = [Span("device 0", 3.5, 4.0), Span("device 0", 6.6, 7.0), Span("link 0", 0.0, 9.0)]
    spans += [Span("device 0", 20.0, 21.0), Span("device 0", 28.0, 29.0)]
    probe = Probe(gates=[(missed, 0.0), (half, 10.0)], spans=spans)
    # The second of two loads of 3 s is there after 6.6 s.
    assert added_wait(probe, load_seconds=3.0) == pytest.approx(0.3e6)
    with pytest.raises(UserError, match="lower memory_budget"):
        added_wait(Probe(gates=[(half, 0.0)], spans=spans), 3.0)


def test_calls_of_a_policy_are_told_apart() -> None:
    seconds = [5.0, 1.0, 3.0, 7.0, 2.0, 2.0]
    spans = [Span("search", 0.0, s) for s in seconds] + [Span("update", 0.0, 4.0)]
    spans += [Span("context_collection", 0.0, 3.0)]
    gates = [(hit(PREFILL, layer % 2), 0.0) for layer in range(4)]
    probe = Probe([(PREFILL, 0.0), (DECODES[0], 1.0)], gates, spans)
    assert predicting(probe, layers=2) == {"embeddings": 6e6, "gate": 2e6, "update": 2e6}
    assert collecting(probe) == 0.5e6
    assert predicting(Probe(), layers=2) == {}


def config(*overrides: str) -> DictConfig:
    small = ("workload.prompts=4", "workload.output_tokens=3", "testbed.time_scale=0.001")
    dropped = [f"~system@systems.{name}" for name in OTHERS]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("calibrate", [*small, *dropped, *overrides])


def test_a_calibration_becomes_a_testbed(tmp_path: Path) -> None:
    cfg = config("dataset=docs")
    path = tmp_path / "mine.yaml"
    calibrate.write_testbed(path, calibrate.calibrate(cfg, Console()))
    assert not list(tmp_path.glob("*.partial"))
    testbed = build(OmegaConf.load(path))  # type: ignore[arg-type]
    assert isinstance(testbed, SimulatedTestbed)
    assert testbed.rate.bytes_per_second == 32e9 / 0.001
    costs = testbed.costs(cfg.model, "finemoe")
    decode, prefill = costs.iteration([1], [40]), costs.iteration([40], [40])
    assert 0 < decode.dense <= prefill.dense
    assert 0 < costs.expert(1) <= costs.expert(40)
    assert costs.collect > 0
    assert min(costs.prediction.embeddings, costs.prediction.gate, costs.prediction.update) > 0
    assert testbed.costs(cfg.model, "on_demand").collect == 0
    with pytest.raises(UserError, match="system=oracle; calibrate again"):
        testbed.costs(cfg.model, "oracle")
    with pytest.raises(UserError, match="with mixtral, not qwen"):
        testbed.costs(OmegaConf.create({"name": "qwen"}), "finemoe")


def test_only_one_emulated_device_is_calibrated() -> None:
    with pytest.raises(UserError, match="one device"):
        calibrate.calibrate(config("testbed.devices=2"), Console())
    with pytest.raises(UserError, match="an emulated one"):
        calibrate.calibrate(config("testbed=h100", "~testbed.time_scale"), Console())
