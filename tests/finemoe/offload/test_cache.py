"""Single cases of the expert cache; `test_transfer` has a model of it."""

import numpy as np
import pytest

from finemoe.offload.cache import NO_SLOT, ExpertCache, Slot
from finemoe.offload.policy import ModelShape

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=1)


def test_an_expert_stays_until_it_is_unpinned_as_often_as_it_was_pinned() -> None:
    cache = ExpertCache(SHAPE, [1], lambda incoming, urgent: np.zeros((3, 4)))
    cache.reserve(0, urgent=False)
    cache.loaded(0)
    cache.pin(0)
    cache.pin(0)
    cache.unpin(0)
    assert cache.reserve(1, urgent=True) == NO_SLOT
    cache.unpin(0)
    assert cache.reserve(1, urgent=True) == 0


def test_a_prefetch_displaces_only_whose_key_is_larger_than_its_own() -> None:
    table = np.arange(12.0).reshape(3, 4)
    table[2] = np.inf
    cache = ExpertCache(SHAPE, [2], lambda incoming, urgent: table, displaces_less=True)
    for expert in (4, 5):
        cache.reserve(expert, urgent=False)
        cache.loaded(expert)
    # 5 is the larger of 4 and 5, and no larger than what is to come.
    assert [cache.reserve(expert, urgent=False) for expert in (6, 8)] == [NO_SLOT, NO_SLOT]
    assert cache.reserve(3, urgent=False) == 5
    assert cache.reserve(8, urgent=True) == 4


def test_the_peak_counts_loading_experts_and_no_slot_is_lost() -> None:
    cache = ExpertCache(SHAPE, [3], lambda incoming, urgent: np.zeros((3, 4)))
    for expert in (0, 1):
        cache.reserve(expert, urgent=False)
    for expert in (0, 1):
        cache.abandon(expert)
    cache.reserve(2, urgent=False)
    assert (cache.occupied, cache.peak_occupied) == (1, 2)
    cache._free[0].append(Slot(0, 0))
    with pytest.raises(AssertionError, match="lost"):
        cache.check_integrity()
