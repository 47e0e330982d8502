"""Traced gates: another model of the same shape routes, live, what the trace says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run.console import Console
from experiments.run.live import LiveBackend, prepare
from experiments.run.routing import Script
from experiments.run.schedule import FixedBatches, Server, Step
from finemoe.assemble import resident_runtime
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Iteration, ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.recorder import Recorder
from finemoe.trace import TracedRequest, TraceError, TraceHeader, trace_writer
from finemoe.traced_gates import GateStep, TracedGates, choices
from tests.command import config
from tests.engine import emulated, offloaded, offloading, recorded, requests

STEPS = 4
BATCH = requests(2, 5, output=STEPS)


def scripted(
    runtime: LiveRuntime, script: Script
) -> tuple[list[torch.Tensor], list[TracedRequest]]:
    """Serve as a script says; return each step's logits and what was routed."""
    logits: list[torch.Tensor] = []
    with Recorder(runtime.model) as recorder:

        def begin(step: Step) -> None:
            recorder.begin(step.iteration)
            script.begin(step)

        backend = LiveBackend(runtime, before=begin)
        backend.choose = script.tokens
        server = Server(backend, listeners=[lambda _: logits.append(backend.logits)])
        served = list(server.serve(FixedBatches(BATCH, len(BATCH))))
    return logits, [
        recorder.finish(one.request.number, one.request.prompt, one.tokens) for one in served
    ]


def trace_of(model: OffloadedModel) -> list[TracedRequest]:
    return [*recorded(model, BATCH)[0].values()]


def counts_of(requests: list[TracedRequest]) -> list[list[Any]]:
    return [[step.counts.tolist() for step in one.steps] for one in requests]


def script_of(gates: TracedGates, model: OffloadedModel, traced: list[TracedRequest]) -> Script:
    steps = {
        one.number: tuple(GateStep.of(step, model.shape.top_k) for step in one.steps)
        for one in traced
    }
    return Script(gates, steps, {one.number: one.output for one in traced}, "a trace")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_another_model_routes_what_the_trace_says_bit_for_bit(family: str) -> None:
    traced, other = trace_of(offloaded(family, seed=0)), offloaded(family, seed=1)
    shape, policy = other.shape, OnDemandPolicy(other.shape)
    assert counts_of(trace_of(other)) != counts_of(traced)
    activated: list[tuple[int, ...]] = []
    with TracedGates(other) as gates:
        with resident_runtime(other, OnDemandPolicy(shape)) as runtime:
            reference, routed = scripted(runtime, script_of(gates, other, traced))
        with offloading(other, policy, (shape.experts,), link_gb_s=100.0) as runtime:
            runtime.listeners.append(lambda outcome: activated.append(outcome.activated))
            logits, _ = scripted(runtime, script_of(gates, other, traced))
            assert runtime.residency.traffic().on_demand > 0
    assert [one.output for one in routed] == [one.output for one in traced]
    assert counts_of(routed) == counts_of(traced)
    for one, due in zip(routed, traced, strict=True):
        for step, wanted in zip(one.steps, due.steps, strict=True):
            np.testing.assert_equal(step.logits, wanted.logits)
    assert activated == [
        tuple(sum(one.steps[step].counts[layer].astype(int) for one in traced).nonzero()[0])
        for step in range(STEPS)
        for layer in range(shape.layers)
    ]
    assert len(logits) == len(reference) == STEPS
    assert all(map(torch.equal, logits, reference))


def test_a_model_is_its_own_again_afterwards() -> None:
    model = offloaded("mixtral", seed=0)
    before = trace_of(model)
    with TracedGates(model) as gates:
        step = GateStep.of(before[0].steps[0], model.shape.top_k)
        with pytest.raises(ValueError, match=r"routes \(5,\) tokens where \(1,\)"):
            gates.begin(Iteration(0, "decode", (0,), (1,)), [step])
    assert [one.output for one in trace_of(model)] == [one.output for one in before]


def test_counts_decide_ties_and_no_more() -> None:
    logits = np.array([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]], np.float32)
    assert choices(logits, np.array([2, 0, 2]), 2).tolist() == [[0, 2], [0, 2]]
    assert choices(logits, np.array([2, 1, 1]), 2).tolist() == [[0, 1], [0, 2]]
    with pytest.raises(ValueError, match="not those of the highest logits"):
        choices(logits, np.array([1, 1, 2]), 2)


SMALL, MIXTRAL = ModelShape(3, 4, 2, 8), ModelShape(32, 8, 2, 8)


@pytest.mark.parametrize(
    ("shape", "override", "cause"),
    [
        (SMALL, "model=mixtral", "3 layers, 4 experts, top 2, not 32 layers, 8 experts, top 2"),
        (MIXTRAL, "workload.prompts=5", "holds 1 requests, not 5"),
        (MIXTRAL, "record=true", "routing="),
        (MIXTRAL, "workload=online", "routing="),
    ],
)
def test_refusals(tmp_path: Path, shape: ModelShape, override: str, cause: str) -> None:
    counts = np.zeros((shape.layers, shape.experts), np.int32)
    counts[:, : shape.top_k] = 1
    logits = np.zeros((shape.layers, 1, shape.experts), np.float32)
    step = RoutedStep(1, counts, logits, None, None)
    path = tmp_path / "trace.parquet"
    with trace_writer(path, TraceHeader(shape, "float32", ("logits",))) as write:
        write(TracedRequest(0, (1,), (2,), (step,)))
    cfg = config("config", f"routing={path}", "weights=dummy", "output=x", override)
    with (
        pytest.raises((UserError, TraceError)) as caught,
        prepare(cfg, emulated(), Console(quiet=True)),
    ):
        pass
    assert cause in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
