"""Words for tests: what the cache has of an expert, and prefetch requests as dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

import numpy as np

from finemoe.offload.cache import ExpertCache
from finemoe.offload.policy import ModelShape, Priorities


class State(Enum):
    """Whether an expert is on its device, on its way, or neither."""

    ABSENT = auto()
    LOADING = auto()
    RESIDENT = auto()


def state(cache: ExpertCache, flat: int) -> State:
    if cache.is_resident(flat):
        return State.RESIDENT
    return State.ABSENT if cache.absent[flat] else State.LOADING


def asking(shape: ModelShape, requests: Mapping[tuple[int, int], float]) -> Priorities:
    """Return the prefetch requests for experts (layer, index) with these priorities."""
    priorities = np.zeros((shape.layers, shape.experts))
    for expert, priority in requests.items():
        priorities[expert] = priority
    return priorities


def asked(priorities: Priorities | None) -> dict[tuple[int, int], float]:
    """Return which experts (layer, index) are requested, and their priorities."""
    if priorities is None:
        return {}
    found = np.argwhere(priorities > 0).tolist()
    return {(layer, index): float(priorities[layer, index]) for layer, index in found}
