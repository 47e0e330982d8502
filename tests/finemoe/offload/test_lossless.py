"""Rule 1: logits and tokens equal those of transformers' own eager experts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from experiments.run.small_models import FAMILIES, small_model
from finemoe.assemble import offloading_runtime
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import Iteration, Phase
from tests.engine import OPTIONS, configured, emulated, offloaded, prepared

STEPS = 5
FEW: dict[str, dict[str, Any]] = {
    "finemoe": {"store_capacity": 3},
    "moe_infinity": {"variant": "code"},
}


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


def systems(family: str) -> list[str]:
    """Return every system that may serve anything, or two for all families but one."""
    if family != "mixtral":
        return ["on_demand", "finemoe"]
    return [system for system in OPTIONS if system not in ("belady", "oracle")]


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
    model = offloaded(family, dtype)
    shape = model.shape
    everything = shape.layers * shape.experts
    for total in {max(shape.top_k, devices), everything // 2, everything}:
        slots = tuple(len(range(device, total, devices)) for device in range(devices))
        for system in systems(family):
            policy = prepared(configured(system, shape, **FEW.get(system, {})), model)
            stored = model.store.layout.nbytes
            testbed = emulated(devices, chunk_bytes=1024)
            runtime = offloading_runtime(model, policy, testbed, slots, stored)
            served = offloaded_logits(runtime, prompts)
            assert all(torch.equal(a, b) for a, b in zip(expected, served, strict=True))
            runtime.residency.cache.check_integrity()
