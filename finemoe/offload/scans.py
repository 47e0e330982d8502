# cython: boundscheck=False, wraparound=False
"""Searches among the experts of one device: loops where compiled, NumPy where interpreted."""

from __future__ import annotations

import math

import cython
import numpy as np
from numpy.typing import NDArray

NOWHERE = -1


def largest(values: NDArray[np.float64], limit: float = math.inf) -> int:
    """Return where the largest value is, the first of equal ones; -1 if all are -inf.

    No value exceeds `limit`.
    """
    best, highest = NOWHERE, -math.inf
    if cython.compiled:
        for place in range(len(values)):
            if values[place] > highest:
                best = place
                highest = values[place]
                if highest >= limit:
                    break
        return best
    place = int(values.argmax())
    return place if values[place] > highest else NOWHERE


def largest_marked(values: NDArray[np.float64], marks: bytearray, first: int, step: int) -> int:
    """Return where the largest of values[first::step] is whose mark is set, the first of equals.

    -1 if no mark is set; both arguments have the same length.
    """
    if cython.compiled:
        best, nothing, place = NOWHERE, -math.inf, first
        highest = nothing
        while place < len(values):
            # Without a branch on the mark, which no processor could foretell.
            value = values[place] if marks[place] else nothing
            if value > highest:
                best = place
                highest = value
            place += step
        return best if best >= 0 else first_marked(marks, first, step)
    marked = np.frombuffer(marks, dtype=bool)[first::step].nonzero()[0]
    if not marked.size:
        return NOWHERE
    return first + step * int(marked[values[first::step][marked].argmax()])


def first_marked(marks: bytearray, first: int, step: int) -> int:
    """Return the first place whose mark is set among first, first + step, ...; -1 if none is."""
    found = marks[first::step].find(1)
    return first + step * found if found >= 0 else NOWHERE
