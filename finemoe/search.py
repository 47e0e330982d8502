"""Semantic and trajectory search over an expert map store (section 4.2 of the paper)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemoe.expert_map import ExpertMapStore, unit
from finemoe.offload.policy import FloatArray


class Match(NamedTuple):
    """The stored iteration nearest to a query, and the cosine between them."""

    entry: int
    score: float


def semantic_search(store: ExpertMapStore, embeddings: FloatArray) -> list[Match]:
    """Return, for each embedding (B, h), the stored iteration of largest cosine (4.2.1)."""
    return _best(unit(embeddings) @ store.embeddings.T, np.ones(len(embeddings)))


class TrajectorySearch:
    """Cosine between the rows observed so far in one iteration and those of every stored map.

    Rows arrive layer by layer, so dot products are carried along instead of being computed anew
    (4.2.2). The store must not change between the first row and the last.
    """

    def __init__(self, store: ExpertMapStore, batch: int) -> None:
        self._store = store
        self._layer = 0
        self._dots = np.zeros((batch, store.size), dtype=np.float32)
        self._squares = np.zeros(batch, dtype=np.float32)

    def observe(self, rows: FloatArray) -> list[Match]:
        """Add the next layer's gate probabilities (B, J); return the best match of each query."""
        self._dots += rows @ self._store.rows(self._layer).T
        self._squares += (rows * rows).sum(axis=1)
        # The query's own norm does not change which map is best.
        scores = self._dots / self._store.prefix_norms(self._layer)
        self._layer += 1
        return _best(scores, np.sqrt(self._squares))


def _best(scores: FloatArray, query_norms: NDArray[np.floating]) -> list[Match]:
    entries = scores.argmax(axis=1).tolist()
    norms = query_norms.tolist()
    return [Match(e, float(row[e]) / n) for e, row, n in zip(entries, scores, norms, strict=True)]
