"""What the cache has of an expert, in one word."""

from __future__ import annotations

from enum import Enum, auto

from finemoe.offload.cache import ExpertCache


class State(Enum):
    """Whether an expert is on its device, on its way, or neither."""

    ABSENT = auto()
    LOADING = auto()
    RESIDENT = auto()


def state(cache: ExpertCache, place: int) -> State:
    if cache.is_resident(place):
        return State.RESIDENT
    return State.ABSENT if cache.absent[place] else State.LOADING
