"""Orders of eviction, kept through copies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from numpy.typing import NDArray

from baselines.deepspeed import DeepSpeedPolicy
from baselines.lfu import LfruPolicy, LfuPolicy
from baselines.on_demand import OnDemandPolicy
from finemoe.offload.eviction import LayeredLruPolicy, Recency, UsageTable
from finemoe.offload.policy import ExpertId, Iteration, LayerOutcome, ModelShape

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=1)
DECODE = Iteration(0, "decode", (0,), (1,))
A, B, C = ExpertId(0, 3), ExpertId(0, 1), ExpertId(1, 0)


def keys(order: Recency) -> NDArray[np.float64]:
    return order.eviction_keys(C, True).copy()


@pytest.mark.parametrize(
    "kind",
    [Recency, UsageTable, LayeredLruPolicy, OnDemandPolicy, LfuPolicy, DeepSpeedPolicy],
)
def test_a_copy_goes_its_own_way(kind: type[Recency]) -> None:
    order = kind(SHAPE)
    order.on_load(A)
    order.on_outcome(LayerOutcome(DECODE, 1, (0, 2), (), ()))
    before = keys(order)
    twin = copy.deepcopy(order)
    assert np.array_equal(keys(twin), before)
    twin.on_load(B)
    assert np.array_equal(keys(order), before)
    changed = keys(twin)
    assert not np.array_equal(changed, before)
    order.on_load(B)
    assert np.array_equal(keys(order), changed)


def test_lfru_weighs_uses_by_the_time_since_the_last() -> None:
    policy = LfruPolicy(SHAPE)
    for layer, used in ((0, (0, 1)), (0, (0,)), (0, (0,)), (1, (1,)), (1, (1,)), (1, (2,))):
        policy.on_outcome(LayerOutcome(DECODE, layer, used, (), ()))
    # Uses over layers since the last one, and one more; 0 of layer 0 has most uses, and leaves
    # before 2 of layer 1, the only one used just now.
    expected = [[3 / 4, 1 / 6, 0, 0], [0, 2 / 2, 1 / 1, 0], [0, 0, 0, 0]]
    assert -policy.eviction_keys(C, True) == pytest.approx(np.array(expected))
    policy.on_load(A)
    assert -policy.eviction_keys(C, True) == pytest.approx(np.array(expected))
