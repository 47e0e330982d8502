"""Semantic and trajectory search over an expert map store (section 4.2 of the paper)."""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import FloatArray


class Matches(NamedTuple):
    """The stored iteration nearest to each query, and the cosine between them, (..., B) each."""

    entries: NDArray[np.intp]
    scores: NDArray[np.float64]

    def after(self, gates: slice | list[int]) -> Self:
        """Return those after some of the gates, which are the first axis."""
        return type(self)(self.entries[gates], self.scores[gates])


def nearest(scores: FloatArray, norms: FloatArray | float = 1.0) -> Matches:
    """Return the best entries by scores (..., B, size), which are divided by norms (..., B).

    Of a store's cosines with embeddings that is the semantic search (4.2.1).
    """
    best = scores.max(axis=-1).astype(np.float64) / norms
    return Matches(scores.argmax(axis=-1), best)


class TrajectorySearch:
    """Cosines of the rows observed so far with all stored maps (4.2.2), which stay as they are."""

    def __init__(self, store: ExpertMapStore, batch: int) -> None:
        self.dots: FloatArray = np.zeros((batch, store.size), dtype=np.float32)
        """Dot products of the observed rows with those of every entry, shape (B, size)."""
        self._store = store
        self._layer = 0
        self._squares = np.zeros(batch, dtype=np.float32)

    def observe(self, rows: FloatArray) -> Matches:
        """Add the next layers' gate probabilities (N, B, J); return matches after each, (N, B)."""
        first, self._layer = self._layer, self._layer + len(rows)
        dots = self._store.running_dots(rows, first, self.dots)
        self.dots = dots[-1]
        squares = np.vecdot(rows, rows)
        squares[0] += self._squares
        squares = squares.cumsum(axis=0)
        self._squares = squares[-1]
        # The query's own norm does not change which map is best.
        scores = dots / self._store.prefix_norms[first : self._layer, None]
        return nearest(scores, np.sqrt(squares))
