"""Traced gates: another model of the same shape routes, live, what the trace says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run.console import Console
from experiments.run.serving import Server
from experiments.run.traced_serving import Prompter, Script, traced_setup
from experiments.run.workloads import Request
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import FloatArray, Iteration, ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.recorder import Recorder
from finemoe.trace import TracedRequest, TraceHeader
from finemoe.trace_file import trace_writer
from finemoe.traced_gates import GateStep, TracedGates, choices
from tests.engine import emulated, offloaded

PROMPTS = ((1, 2, 3, 4, 5), (60, 50, 40, 30, 20))
STEPS = 4


def requests() -> list[Request]:
    return [Request(number, prompt, STEPS) for number, prompt in enumerate(PROMPTS)]


def record(runtime: LiveRuntime, server: Server) -> list[TracedRequest]:
    with Recorder(runtime.model) as recorder:
        server.listeners.append(recorder.begin)
        served = server.serve(requests())
    return [recorder.finish(one.request.number, one.request.prompt, one.tokens) for one in served]


def trace_of(model: OffloadedModel) -> list[TracedRequest]:
    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        return record(runtime, Server(runtime))


def prompted(
    gates: TracedGates, runtime: LiveRuntime, traced: Sequence[TracedRequest]
) -> tuple[Server, list[TracedRequest]]:
    """Serve as the trace says; return the server and what was routed."""
    scripts = {
        one.number: Script(
            tuple(GateStep.of(step, runtime.model.shape.top_k) for step in one.steps), one.output
        )
        for one in traced
    }
    prompter = Prompter(gates, scripts)
    server = Server(runtime, listeners=[prompter.begin], choose=prompter.choose)
    return server, record(runtime, server)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe", "gpt_oss"])
def test_another_model_routes_what_the_trace_says(family: str) -> None:
    traced, other = trace_of(offloaded(family, seed=0)), offloaded(family, seed=1)
    own = trace_of(other)
    assert any(
        (a.counts != b.counts).any()
        for one, another in zip(traced, own, strict=True)
        for a, b in zip(one.steps, another.steps, strict=True)
    )
    with (
        TracedGates(other) as gates,
        resident_runtime(other, OnDemandPolicy(other.shape)) as runtime,
    ):
        _, found = prompted(gates, runtime, traced)
    for one, replayed in zip(traced, found, strict=True):
        assert replayed.output == one.output
        assert len(replayed.steps) == STEPS
        for due, step in zip(one.steps, replayed.steps, strict=True):
            assert step.counts.tolist() == due.counts.tolist()
            assert due.logits is not None
            assert step.logits is not None
            np.testing.assert_array_equal(step.logits, due.logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_offloading_changes_no_bit_and_loads_what_the_trace_activates(family: str) -> None:
    traced, other = trace_of(offloaded(family, seed=0)), offloaded(family, seed=1)
    testbed = emulated(link_gb_s=100.0)
    layout, shape = other.store.layout, other.shape
    activated: list[tuple[int, ...]] = []
    with TracedGates(other) as gates:
        with resident_runtime(other, OnDemandPolicy(shape)) as runtime:
            reference, _ = prompted(gates, runtime, traced)
        policy = OnDemandPolicy(shape)
        slots = (shape.experts,)
        with offloading_runtime(other, policy, testbed, slots, layout.nbytes) as runtime:
            runtime.listeners.append(lambda outcome: activated.append(outcome.activated))
            server, _ = prompted(gates, runtime, traced)
            assert runtime.residency.traffic().on_demand > 0
    due = [
        tuple(sum(one.steps[step].counts[layer].astype(int) for one in traced).nonzero()[0])
        for step in range(STEPS)
        for layer in range(shape.layers)
    ]
    assert activated == due
    assert len(server.logits) == len(reference.logits) == STEPS
    for found, wanted in zip(server.logits, reference.logits, strict=True):
        assert torch.equal(found, wanted)


def test_a_model_is_its_own_again_afterwards() -> None:
    model = offloaded("mixtral", seed=0)
    before = trace_of(model)
    with TracedGates(model):
        pass
    after = trace_of(model)
    assert [one.output for one in after] == [one.output for one in before]


def test_steps_of_another_length_are_refused() -> None:
    model = offloaded("mixtral", seed=0)
    step = GateStep.of(trace_of(model)[0].steps[0], model.shape.top_k)
    with pytest.raises(ValueError, match=r"routes \(5,\) tokens where \(1,\)"):
        TracedGates(model).begin(Iteration(0, "decode", (0,), (1,)), [step])


# Choices ----------------------------------------------------------------------------------------


def test_counts_decide_ties() -> None:
    logits = np.array([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]], np.float32)
    assert choices(logits, np.array([2, 0, 2]), 2).tolist() == [[0, 2], [0, 2]]
    assert choices(logits, np.array([2, 1, 1]), 2).tolist() == [[0, 1], [0, 2]]


def test_choices_that_no_logits_lead_to_are_refused() -> None:
    with pytest.raises(ValueError, match="not those of the highest logits"):
        choices(np.array([[3.0, 2.0, 1.0]], np.float32), np.array([0, 1, 1]), 2)


@given(arrays(np.float32, (1, 6), elements=st.sampled_from([0.0, 0.5, 1.0])), st.data())
def test_one_token_chooses_exactly_what_is_counted(logits: FloatArray, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(6)))
    picked = sorted(order, key=lambda expert: -logits[0, expert])[:3]
    counts = np.bincount(picked, minlength=6)
    (index,) = choices(logits, counts, 3)
    assert sorted(index.tolist()) == sorted(picked)
    assert (np.diff(logits[0, index]) <= 0).all()


# Refusals ---------------------------------------------------------------------------------------


def refusal(path: Path, *overrides: str) -> str:
    conf = Path(__file__).parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("config", [f"routing={path}", "weights=dummy", "output=x", *overrides])
    testbed = emulated()
    with pytest.raises(UserError) as caught, traced_setup(cfg, testbed, Console(quiet=True)):
        pass
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def tiny_trace(path: Path, shape: ModelShape) -> Path:
    counts = np.zeros((shape.layers, shape.experts), np.int32)
    counts[:, : shape.top_k] = 1
    logits = np.zeros((shape.layers, 1, shape.experts), np.float32)
    step = RoutedStep(1, counts, logits, None, None)
    with trace_writer(path, TraceHeader(shape, "float32", ("logits",))) as write:
        write(TracedRequest(0, (1,), (2,), (step,)))
    return path


def test_a_trace_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "trace.parquet", ModelShape(3, 4, 2, 8))
    message = refusal(path, "model=mixtral")
    assert "3 layers, 4 experts, top 2, not 32 layers, 8 experts, top 2" in message


def test_too_few_requests_are_refused(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "trace.parquet", ModelShape(32, 8, 2, 8))
    assert "holds 1 requests, not 5" in refusal(path, "workload.prompts=5")


@pytest.mark.parametrize("override", ["record=true", "store.save=s", "workload=online"])
def test_what_a_trace_cannot_serve_is_refused(tmp_path: Path, override: str) -> None:
    assert "routing=" in refusal(tmp_path / "none.parquet", override)
