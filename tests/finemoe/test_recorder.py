"""The recorder: what it hands out is what the model routed, and the model does not notice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.on_demand import OnDemandPolicy
from experiments.run.schedule import Request
from finemoe.assemble import resident_runtime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import GateWeights, Iteration
from finemoe.recorder import Recorder, gate_weights
from finemoe.trace import CONTENTS, TracedRequest, TraceHeader, TraceReader, trace_writer
from tests.architectures import member
from tests.engine import CPU, offloaded, recorded, requests, serve

PROMPTS = requests(2, 5)


def record(model: OffloadedModel, *served: Request) -> list[TracedRequest]:
    return [*recorded(model, [*served])[0].values()]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe"])
def test_gates_reproduce_the_logits(family: str) -> None:
    model = offloaded(family)
    gates = gate_weights(model)
    (request,) = record(model, PROMPTS[0])
    steps: Any = request.steps
    for step in steps:
        for layer in range(model.shape.layers):
            found = gates.logits(layer, step.hidden_states[layer])
            # bfloat16 has 8 bits; a logit near zero is rounded in the sums that lead to it.
            np.testing.assert_allclose(found, step.logits[layer], rtol=2**-8, atol=2**-8)


def test_gates_have_a_bias_and_one_shape() -> None:
    model = offloaded("gpt_oss")
    for number, gate in enumerate(model.gates):
        gate.bias.data.fill_(number + 1)  # type: ignore[operator]
    gates = gate_weights(model)
    with_bias, without = gates.logits(2, np.zeros((1, 32), np.float32)), np.full((1, 4), 3.0)
    np.testing.assert_array_equal(with_bias, without)
    # Gates that choose by something else are refused.
    model.gates[0].weight = torch.nn.Parameter(torch.zeros(3, 32))
    for other in (model, OffloadedModel.from_model(member("gemma4_text"), CPU)):
        with pytest.raises(ValueError, match="more than a linear map"):
            gate_weights(other)


def test_a_batch_is_shared_out_by_request() -> None:
    """In float32, each request of a batch routes as it does alone."""
    model = offloaded("mixtral", torch.float32)
    for request, served in zip(record(model, *PROMPTS), PROMPTS, strict=True):
        (alone,) = record(model, served)
        assert request.number == alone.number
        assert request.output == alone.output
        for step, due in zip(request.steps, alone.steps, strict=True):
            np.testing.assert_array_equal(step.counts, due.counts)
            for name in CONTENTS:
                found, own = getattr(step, name), getattr(due, name)
                np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_model_does_not_notice(family: str) -> None:
    model = offloaded(family)
    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        unrecorded = [one.tokens for one in serve(runtime, PROMPTS)]
    hooks = [len(module._forward_hooks) for module in model.model.modules()]
    assert [request.output for request in record(model, *PROMPTS)] == unrecorded
    assert [len(module._forward_hooks) for module in model.model.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in model.experts)


def test_corrected_sigmoids_are_ranked_within_the_best_groups() -> None:
    """Four experts in two groups of two, of which one is kept; logits are the hidden state."""
    correction = np.array([[0, 0, 0.3, 0]], np.float32)
    gates = GateWeights(np.eye(4, dtype=np.float32)[None], None, correction, (2, 1))
    shares = np.exp(gates.logits(0, np.array([[0, 0, 0, -np.log(3)]], np.float32)))
    # Sigmoids of 0.5, 0.5 | 0.5 + 0.3, 0.25: the second group has more in sum.
    assert shares[0] == pytest.approx([0, 0, 0.8 / 1.05, 0.25 / 1.05], abs=1e-5)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_gates_of_groups_are_recorded_as_they_rank(kind: str, tmp_path: Path) -> None:
    model = OffloadedModel.from_model(member(kind), CPU)
    gates = gate_weights(model)
    assert gates.groups == (2, 1)
    (request,) = record(model, PROMPTS[0])
    step: Any = request.steps[0]
    hidden = step.hidden_states
    assert np.allclose(gates.logits(slice(None), hidden), step.logits, atol=1e-3)
    header = TraceHeader(model.shape, "float32", CONTENTS, {}, gates)
    with trace_writer(tmp_path / "trace", header) as write:
        write(request)
    with TraceReader(tmp_path / "trace") as trace:
        kept: Any = trace.header.gates
    assert (kept.groups, kept.correction is not None) == (gates.groups, True)
    assert np.array_equal(kept.logits(1, hidden[1]), gates.logits(1, hidden[1]))


def test_hidden_states_are_what_went_into_the_gate() -> None:
    """In Gemma 4 the experts get another input."""
    model, shown = OffloadedModel.from_model(member("gemma4_text"), CPU), list[torch.Tensor]()
    model.gates[1].register_forward_hook(lambda _module, inputs, _output: shown.append(inputs[0]))
    (request,) = record(model, PROMPTS[0])
    steps: Any = request.steps
    for step, own in zip(steps, shown, strict=True):
        assert np.array_equal(step.hidden_states[1], own.float().numpy())


def test_an_iteration_that_broke_off_is_forgotten() -> None:
    model = offloaded("mixtral")
    with Recorder(model) as recorder:
        recorder.begin(Iteration(0, "prefill", (0,), (5,)))
        model.model.get_input_embeddings()(torch.tensor(PROMPTS[0].prompt))
        model.gates[0](torch.zeros(5, 32, dtype=torch.bfloat16))
        with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
            serve(runtime, PROMPTS[:1], before=lambda step: recorder.begin(step.iteration))
        assert [step.tokens for step in recorder.finish(0, (), ()).steps] == [5, 1, 1]
        with pytest.raises(KeyError):
            recorder.finish(0, (), ())
