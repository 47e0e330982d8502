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
    return _best(store.embeddings @ unit(embeddings).T, np.ones(len(embeddings)))


class TrajectorySearch:
    """Cosine between the rows observed so far in one iteration and those of every stored map.

    Rows arrive layer by layer, so dot products are carried along instead of being computed anew
    (4.2.2). The store must not change between the first row and the last.
    """

    def __init__(self, store: ExpertMapStore, batch: int) -> None:
        self._store = store
        self._layer = 0
        self._dots = np.zeros((store.size, batch), dtype=np.float32)
        self._squares = np.zeros(batch, dtype=np.float32)
        self._computed: list[list[Match]] = []

    def observe(self, rows: FloatArray) -> list[Match]:
        """Add the next layer's gate probabilities (B, J); return the best match of each query."""
        layer = self._layer
        self._layer += 1
        if self._computed:
            return self._computed[layer]
        self._dots += self._store.rows(layer) @ rows.T
        self._squares += np.vecdot(rows, rows)
        # The query's own norm does not change which map is best.
        scores = self._dots / self._store.prefix_norms(layer)[:, None]
        return _best(scores, np.sqrt(self._squares))

    def compute_ahead(self, rows: FloatArray) -> None:
        """Compute what `observe` is going to return for the rows of all layers, (L, B, J)."""
        dots = np.matmul(self._store.all_rows, rows.swapaxes(1, 2)).cumsum(axis=0)
        norms = np.sqrt(np.vecdot(rows, rows).cumsum(axis=0))
        dots /= self._store.all_prefix_norms[:, :, None]
        self._computed = [_best(*layer) for layer in zip(dots, norms, strict=True)]


def _best(scores: FloatArray, query_norms: NDArray[np.floating]) -> list[Match]:
    """Return the best entries by scores (size, B), which are divided by the queries' norms (B,)."""
    entries = scores.argmax(axis=0).tolist()
    norms = query_norms.tolist()
    return [Match(e, float(scores[e, q]) / norms[q]) for q, e in enumerate(entries)]
