"""Single cases of the expert cache; `test_transfer` has it against a naive model."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from finemoe.offload.cache import NO_SLOT, ExpertCache, Slot
from finemoe.offload.policy import ModelShape

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=1)


def full_cache(keys: NDArray[np.float64], count: int) -> ExpertCache:
    """Hold the first `count` experts in as many slots of one device."""
    cache = ExpertCache(SHAPE, [count], lambda incoming, urgent: keys)
    for expert in range(count):
        cache.reserve(expert, urgent=False)
        cache.loaded(expert)
    return cache


def test_keys_that_are_updated_in_place_count_at_once() -> None:
    keys = np.zeros((3, 4))
    cache = full_cache(keys, 2)
    keys[0, 1] = 1.0
    assert cache.reserve(8, urgent=False) == 1
    cache.loaded(8)
    keys[0, 0], keys[2, 0] = 0.0, 2.0
    assert cache.reserve(9, urgent=False) == 8


def test_an_expert_stays_until_it_is_unpinned_as_often_as_it_was_pinned() -> None:
    cache = full_cache(np.zeros((3, 4)), 1)
    cache.pin(0)
    cache.pin(0)
    cache.unpin(0)
    assert cache.reserve(1, urgent=True) == NO_SLOT
    cache.unpin(0)
    assert cache.reserve(1, urgent=True) == 0


def test_the_peak_counts_loading_experts_and_outlasts_them() -> None:
    cache = ExpertCache(SHAPE, [3], lambda incoming, urgent: np.zeros((3, 4)))
    for expert in (0, 1):
        cache.reserve(expert, urgent=False)
    for expert in (0, 1):
        cache.abandon(expert)
    cache.reserve(2, urgent=False)
    assert (cache.occupied, cache.peak_occupied) == (1, 2)


def test_integrity_notices_a_lost_slot() -> None:
    cache = full_cache(np.zeros((3, 4)), 2)
    cache._free[0].append(Slot(0, 0))
    with pytest.raises(AssertionError, match="free"):
        cache.check_integrity()
