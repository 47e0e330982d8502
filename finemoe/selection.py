"""Which experts of the searched maps to prefetch, and in which order (sections 4.3 and 4.5).

Rows are target layers: N of them, each with what Q queries expect of J experts. Where the paper and
the authors' demo repository differ, `variant` chooses: `paper`, or `demo`, which selects one expert
fewer, decays priorities linearly over the predicted layers, and queues all other experts of those
layers at the tail.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import SMALLEST_PRIORITY, FloatArray, Priorities

Variant = Literal["paper", "demo"]

TAIL_PRIORITY = 1e-6


def select_experts(
    probabilities: FloatArray, scores: NDArray[np.float64], top_k: int, variant: Variant = "paper"
) -> NDArray[np.bool_]:
    """Choose experts by descending p until their sum reaches delta = clip(1 - score, 0, 1).

    Never fewer than `top_k`. The demo stops one short of reaching delta. Takes probabilities (R, J)
    and scores (R,), returns what is chosen (R, J).
    """
    rows, ranks = np.arange(len(scores))[:, None], np.arange(probabilities.shape[1])
    deltas = np.minimum(np.maximum(1.0 - scores, 0.0), 1.0)[:, None]
    order = (-probabilities).argsort(axis=1, kind="stable")
    # A running sum in double precision, one addend after the other.
    sums = probabilities[rows, order].cumsum(axis=1, dtype=np.float64)
    paper = variant == "paper"
    # The paper takes also the one that reaches delta.
    counts = (sums < deltas if paper else sums <= deltas).sum(axis=1) + int(paper)
    chosen = np.empty(probabilities.shape, dtype=bool)
    chosen[rows, order] = ranks < np.maximum(counts, top_k)[:, None]
    return chosen


def top_experts(scores: NDArray[Any], count: int | None) -> NDArray[np.bool_]:
    """Return where the `count` largest scores of the last axis are; the first of equals wins.

    None takes all.
    """
    order = (-scores).argsort(axis=-1, kind="stable")[..., :count]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def divisors(band: range, now: int, variant: Variant) -> NDArray[np.float64]:
    """Return by what the probabilities of a band of layers are divided as priorities, (N,).

    l - l_now (section 4.5), or for the demo what makes its decay over the band, which starts at
    layer `start` and ends before layer `end`: 1 - (l - start) / (end + 1).
    """
    layers = np.arange(band.start, band.stop, dtype=np.float64)
    if variant == "paper":
        return layers - now
    return (band.stop + 1) / (band.stop + 1 - (layers - band.start))


def union_priorities(
    probabilities: FloatArray, chosen: NDArray[np.bool_], by: NDArray[np.float64], variant: Variant
) -> Priorities:
    """Return the priorities of the queries' union, (N, J); 0 for what is not to be prefetched.

    Takes probabilities and what is chosen of them (N, Q, J), and divisors (N,), or (1,) for all.
    """
    priorities = probabilities / by[:, None, None]
    if variant == "paper":
        priorities = np.where(chosen, np.maximum(priorities, SMALLEST_PRIORITY), 0.0)
    else:
        priorities = np.where(chosen, priorities, 0.0) + TAIL_PRIORITY
    return priorities.max(axis=1)
