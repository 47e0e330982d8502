# cython: boundscheck=False, wraparound=False
"""Searches among the experts of one device: loops where compiled, NumPy where interpreted."""

from __future__ import annotations

import math

import cython
import numpy as np
from numpy.typing import NDArray

LOWEST = -math.inf


def largest(values: NDArray[np.float64], start: int, stop: int, limit: float) -> int:
    """Return where the largest of values[start:stop] is, the first of equal ones.

    -1 if there is none, or all are -inf. No value exceeds `limit`.
    """
    best, highest = -1, LOWEST
    if cython.compiled:
        for place in range(start, stop):
            if values[place] > highest:
                best = place
                highest = values[place]
                if highest >= limit:
                    break
        return best
    if start == stop:
        return -1
    place = start + int(values[start:stop].argmax())
    return place if values[place] > highest else -1


def largest_of(
    values: NDArray[np.float64], places: NDArray[np.int32], start: int, stop: int
) -> int:
    """Return which of places[start:stop] has the largest value, the lowest of equals.

    -1 if there is none; -inf is a value like any other, and NaN the largest.
    """
    best, highest = -1, LOWEST
    if cython.compiled:
        for at in range(start, stop):
            place = places[at]
            value = values[place]
            if value != value:
                return place
            if value >= highest and (value > highest or place < best or best < 0):
                best = place
                highest = value
        return best
    if start == stop:
        return -1
    among = np.sort(places[start:stop])
    return int(among[values[among].argmax()])
