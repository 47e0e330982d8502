"""Rule 1: logits and tokens equal those of transformers' own eager experts, bit for bit."""

from typing import Any

import pytest
import torch

from experiments.run.live import PlainRuntime
from experiments.run.models import FAMILIES, small_model
from tests import engine
from tests.engine import OPTIONS, logits_of, offloaded, offloading, prepared, requests

FEW: dict[str, dict[str, Any]] = {
    "finemoe": {"store_capacity": 3},
    "moe_infinity": {"variant": "code"},
}


def systems(family: str) -> list[str]:
    """Return every system that may serve anything, or two for all families but one."""
    if family != "mixtral":
        return ["on_demand", "finemoe"]
    return [system for system in OPTIONS if system not in ("belady", "oracle")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "batch", "devices"),
    [(torch.bfloat16, 1, 1), (torch.bfloat16, 3, 3), (torch.float32, 3, 1)],
)
def test_budgets_are_lossless(family: str, dtype: torch.dtype, batch: int, devices: int) -> None:
    served = requests(batch, 7, output=5)
    expected = logits_of(PlainRuntime(small_model(family, dtype)), served)
    model = offloaded(family, dtype)
    shape = model.shape
    for total in {max(shape.top_k, devices), shape.size // 2, shape.size}:
        slots = tuple(len(range(device, total, devices)) for device in range(devices))
        for system in systems(family):
            policy = prepared(engine.configured(system, shape, **FEW.get(system, {})), model)
            with offloading(model, policy, slots, chunk_bytes=1024) as runtime:
                logits = logits_of(runtime, served)
            assert len(logits) == len(expected) == 5
            assert all(map(torch.equal, logits, expected))
            runtime.residency.cache.check_integrity()
