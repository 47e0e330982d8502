"""Semantic and trajectory search over an expert map store (section 4.2 of the paper)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.expert_map import ExpertMapStore, unit
from finemoe.offload.policy import FloatArray


class Match(NamedTuple):
    """The stored iteration nearest to a query, and the cosine between them."""

    entry: int
    score: float


def semantic_search(store: ExpertMapStore, embeddings: FloatArray) -> list[Match]:
    """Return, for each embedding (B, h), the stored iteration of largest cosine (4.2.1)."""
    return _best(unit(embeddings) @ store.embeddings.T)


class TrajectorySearch:
    """Cosine between the rows observed so far in one iteration and those of every stored map.

    Rows arrive layer by layer, so dot products are carried along instead of being computed anew
    (4.2.2). The store must not change between the first row and the last.
    """

    def __init__(self, store: ExpertMapStore, batch: int) -> None:
        self._store = store
        self._layer = 0
        self._dots = np.zeros((batch, store.size), dtype=np.float32)
        self._squares = np.zeros((batch, 1), dtype=np.float32)

    def observe(self, rows: FloatArray) -> list[Match]:
        """Add the next layer's gate probabilities (B, J); return the best match of each query."""
        self._dots += rows @ self._store.rows(self._layer).T
        self._squares += (rows**2).sum(axis=1, keepdims=True)
        norms = np.sqrt(self._squares) * self._store.prefix_norms(self._layer)
        self._layer += 1
        return _best(self._dots / norms)


def _best(scores: FloatArray) -> list[Match]:
    entries = scores.argmax(axis=1)
    best = scores[np.arange(len(scores)), entries]
    return [Match(int(e), float(s)) for e, s in zip(entries, best, strict=True)]
