"""Rule 1: logits and tokens equal those of transformers' own eager experts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from baselines.on_demand import OnDemandPolicy
from experiments.small_models import FAMILIES, small_model
from finemoe.assemble import offloading_runtime
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Iteration, Phase, Policy
from finemoe.policy import FineMoEOptions, FineMoEPolicy
from finemoe.testbed import Testbed

STEPS = 5
FAST_LINK_GB_S = 0.5


def emulated(devices: int) -> Testbed:
    cpu = (torch.device("cpu"),) * devices
    return Testbed("test", "emulated", cpu, chunk_bytes=1024, link_gb_s=FAST_LINK_GB_S)


def plain_logits(model: PreTrainedModel, prompts: torch.Tensor) -> list[torch.Tensor]:
    return _serve(lambda step, **inputs: model(**inputs), prompts)


def offloaded_logits(runtime: LiveRuntime, prompts: torch.Tensor) -> list[torch.Tensor]:
    batch, length = prompts.shape

    def step(number: int, **inputs: torch.Tensor) -> Any:
        tokens = (length if number == 0 else 1,) * batch
        phase: Phase = "prefill" if number == 0 else "decode"
        return runtime.forward(Iteration(number, phase, tuple(range(batch)), tokens), **inputs)

    with runtime:
        return _serve(step, prompts)


@torch.no_grad()
def _serve(step: Callable[..., Any], prompts: torch.Tensor) -> list[torch.Tensor]:
    logits, tokens, cache = [], prompts, None
    for number in range(STEPS):
        output = step(number, input_ids=tokens, cache=cache, use_cache=True)
        logits.append(output.logits[:, -1].clone())
        cache = output.cache
        tokens = logits[-1].argmax(-1, keepdim=True)
    return logits


def policies(model: OffloadedModel) -> list[Policy]:
    options = FineMoEOptions(prefetch_distance=1, store_capacity=3)
    return [OnDemandPolicy(model.shape), FineMoEPolicy(model.shape, options)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("devices", [1, 3])
def test_every_budget_serves_the_same_logits(
    family: str, dtype: torch.dtype, batch: int, devices: int
) -> None:
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(128, (batch, 7), generator=generator)
    expected = plain_logits(small_model(family, dtype), prompts)
    model = OffloadedModel.from_model(small_model(family, dtype), torch.device("cpu"))
    shape = model.shape
    everything = shape.layers * shape.experts
    for total in {max(shape.top_k, devices), everything // 2, everything}:
        slots = tuple(len(range(device, total, devices)) for device in range(devices))
        for policy in policies(model):
            stored = model.store.layout.nbytes
            runtime = offloading_runtime(model, policy, emulated(devices), slots, stored)
            served = offloaded_logits(runtime, prompts)
            assert all(torch.equal(a, b) for a, b in zip(expected, served, strict=True))
            runtime.residency.cache.check_integrity()
