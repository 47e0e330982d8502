"""The activation matrices of MoE-Infinity: those of past requests, and of one under way.

A request's matrix (L x J) counts its tokens per expert, over its prompt and its decoded tokens.
File names below are those of the original code, TorchMoE/MoE-Infinity.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finemoe.expert_map import StoreMismatch, read_arrays, unit, write_arrays
from finemoe.offload.policy import FloatArray, ModelShape

Variant = Literal["paper", "code"]
"""Whether all rows so far are compared, or those after the current layer (expert_tracer.py)."""


class MatrixCollection:
    """Up to `capacity` activation matrices (L, J) of finished requests.

    Two matrices are as similar as the mean, over the layers, of the cosines of their rows
    (`find_most_similar`, expert_tracer.py); a layer without tokens counts as zero. In a full
    collection a new one replaces the most similar one, or the least often matched.
    """

    def __init__(
        self, shape: ModelShape, capacity: int, replace: Literal["similar", "unmatched"]
    ) -> None:
        self.shape = shape
        self.capacity = capacity
        self._replace = replace
        self.size = 0
        self.matches = np.zeros(capacity, dtype=np.int64)  # how often each was the nearest
        self.popularity = np.zeros((shape.layers, shape.experts))
        """Tokens of all stored requests per expert."""
        self.additions = 0
        self._prepared = 0
        self._matrices = np.zeros((capacity, shape.layers, shape.experts), dtype=np.float32)
        self._ratios = np.zeros_like(self._matrices)
        self._rows = np.zeros((shape.layers, capacity, shape.experts), dtype=np.float32)

    @property
    def matrices(self) -> FloatArray:
        """The stored matrices, shape (size, L, J)."""
        return self._matrices[: self.size]

    def rows(self, layers: slice) -> FloatArray:
        """Return rows of every stored matrix scaled to unit length, shape (layers, size, J)."""
        return self._rows[layers, : self.size]

    def ratios(self, entries: NDArray[np.intp]) -> FloatArray:
        """Return each expert's share of its layer's activations, shape (entries, L, J); a copy."""
        return self._ratios[entries]

    def memory_bytes(self) -> dict[str, int]:
        matrices = self._matrices.nbytes
        return {"matrices": matrices, "store": matrices + self._ratios.nbytes + self._rows.nbytes}

    def counts(self) -> dict[str, int]:
        return {"entries": self.size}

    def keep_all(self) -> None:
        """Keep what is stored now from being the least matched (`persistent_capacity`)."""
        self._prepared = self.size

    def similarity(self, matrix: FloatArray) -> FloatArray:
        """Return the similarity of a matrix (L, J) to every stored one, shape (size,)."""
        cosines = np.matmul(self._rows[:, : self.size], unit(matrix)[:, :, None])[..., 0]
        return cosines.mean(axis=0)

    def add(self, matrix: FloatArray) -> int | None:
        """Store a matrix and return its entry; None if it was full of matrices to be kept."""
        if self.size < self.capacity:
            entry = self.size
            self.size += 1
        elif self._replace == "similar":
            entry = int(self.similarity(matrix).argmax())
        elif self._prepared < self.size:
            entry = self._prepared + int(self.matches[self._prepared :].argmin())
        else:
            return None
        self.popularity += matrix - self._matrices[entry]
        self._matrices[entry] = matrix
        self._ratios[entry] = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        self._rows[:, entry] = unit(matrix)
        self.matches[entry] = 1
        self.additions += 1
        return entry

    def save(self, path: Path, model_id: str) -> None:
        write_arrays(path, {"model_id": model_id}, {"matrices": self.matrices.copy()})

    def load(self, path: Path, model_id: str) -> None:
        shape = ("entries", self.shape.layers, self.shape.experts)
        (matrices,) = read_arrays(path, {"model_id": model_id}, matrices=shape)
        if (matrices != abs(matrices.round())).any():
            raise StoreMismatch(f"{path} holds matrices that do not count tokens")
        for matrix in matrices:
            self.add(matrix)


class RunningRequest:
    """The matrix of a request under way, and each row's cosine with every stored row, summed up."""

    def __init__(self, collection: MatrixCollection, variant: Variant) -> None:
        shape = collection.shape
        self.matrix = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        self._collection = collection
        self._variant = variant
        self._cosines = np.zeros((shape.layers, collection.capacity), dtype=np.float32)
        self._sums = np.zeros(collection.capacity, dtype=np.float32)

    def begin_iteration(self) -> None:
        """Sum up anew, so that rounding errors do not pile up."""
        size = self._collection.size
        self._sums[:size] = self._cosines[:, :size].sum(axis=0)

    def refresh(self, entry: int) -> None:
        """Compare with a matrix that was stored after this request had begun."""
        stored = self._collection.matrices[entry]
        self._cosines[:, entry] = (unit(stored) * unit(self.matrix)).sum(axis=1)

    def count(self, layers: slice, tokens: FloatArray) -> FloatArray:
        """Add tokens (gates, J) of gates in a row; return similarities after each (gates, size)."""
        rows = self.matrix[layers]
        rows += tokens
        lengths = np.sqrt(np.vecdot(rows, rows))[:, None]
        directions = rows / np.maximum(lengths, 1e-30)
        cosines = np.matmul(self._collection.rows(layers), directions[:, :, None])[..., 0]
        known = self._cosines[layers, : self._collection.size]
        changes = cosines - known if self._variant == "paper" else -known
        known[:] = cosines
        carried = self._sums[: self._collection.size]
        changes[0] += carried
        sums: FloatArray = changes.cumsum(axis=0)
        carried[:] = sums[-1]
        return sums
