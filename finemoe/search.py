"""Semantic and trajectory search over an expert map store (section 4.2 of the paper)."""

from typing import NamedTuple

import numpy as np

from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import FloatArray


class Match(NamedTuple):
    """The stored iteration nearest to a query, and the cosine between them."""

    entry: int
    score: float


def semantic_search(store: ExpertMapStore, embeddings: FloatArray) -> list[Match]:
    """Return, for each embedding (B, h), the stored iteration of largest cosine (4.2.1)."""
    return nearest(store.cosines(embeddings))


def nearest(cosines: FloatArray) -> list[Match]:
    """Return the best match of each query by its cosines with every entry, (B, size)."""
    return _matches(cosines[None], np.ones((1, len(cosines)), dtype=np.float32))[0]


class TrajectorySearch:
    """Cosines of the rows observed so far with all stored maps (4.2.2), which stay as they are."""

    def __init__(self, store: ExpertMapStore, batch: int) -> None:
        self.dots: FloatArray = np.zeros((batch, store.size), dtype=np.float32)
        """Dot products of the observed rows with those of every entry, shape (B, size)."""
        self._store = store
        self._layer = 0
        self._squares = np.zeros(batch, dtype=np.float32)

    def observe(self, rows: FloatArray) -> list[Match]:
        """Add the next layer's gate probabilities (B, J); return the best match of each query."""
        return self.observe_all(rows[None])[0]

    def observe_all(self, rows: FloatArray) -> list[list[Match]]:
        """Add the next layers' rows (N, B, J); return what `observe` would, layer by layer."""
        first, self._layer = self._layer, self._layer + len(rows)
        dots = self._store.running_dots(rows, first, self.dots)
        self.dots = dots[-1]
        squares = np.vecdot(rows, rows)
        squares[0] += self._squares
        squares = squares.cumsum(axis=0)
        self._squares = squares[-1]
        # The query's own norm does not change which map is best.
        scores = dots / self._store.prefix_norms[first : self._layer, None]
        return _matches(scores, np.sqrt(squares))


def _matches(scores: FloatArray, query_norms: FloatArray) -> list[list[Match]]:
    """Return the best entries by scores (L, B, size), which are divided by norms (L, B)."""
    entries = scores.argmax(axis=-1).tolist()
    best = (scores.max(axis=-1).astype(np.float64) / query_norms).tolist()
    return [list(map(Match, *layer)) for layer in zip(entries, best, strict=True)]
