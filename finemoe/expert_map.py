"""Expert maps and the store that remembers them (sections 4.1 and 4.4 of the paper)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finemoe.offload.policy import FloatArray, ModelShape


class StoreMismatch(ValueError):
    """A store file belongs to another model, or is no store file."""


class ExpertMapStore:
    """Up to `capacity` iterations: an expert map (L, J) and a semantic embedding (h,) each.

    An expert map holds the gate's full softmax of every layer. When the store is full, the stored
    iteration most redundant with the new one is replaced: RDY = d/L * score_sem + (L-d)/L *
    score_traj, both cosines (section 4.4).
    """

    def __init__(self, shape: ModelShape, capacity: int, prefetch_distance: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.size = 0
        self._semantic_share = min(prefetch_distance, shape.layers) / shape.layers
        self._maps = np.zeros((shape.layers, capacity, shape.experts), dtype=np.float32)
        self._embeddings = np.zeros((capacity, shape.hidden_size), dtype=np.float32)
        self._prefix_norms = np.zeros((shape.layers, capacity), dtype=np.float32)

    def rows(self, layer: int) -> FloatArray:
        """Return row `layer` of every stored map, shape (size, J)."""
        return self._maps[layer, : self.size]

    @property
    def all_rows(self) -> FloatArray:
        """Return every row of every stored map, shape (L, size, J)."""
        return self._maps[:, : self.size]

    @property
    def all_prefix_norms(self) -> FloatArray:
        """Return the prefix norms of every layer, shape (L, size)."""
        return self._prefix_norms[:, : self.size]

    def expert_map(self, entry: int) -> FloatArray:
        """Return the map of one stored iteration, shape (L, J)."""
        return self._maps[:, entry]

    @property
    def embeddings(self) -> FloatArray:
        """Stored embeddings scaled to unit length, shape (size, h)."""
        return self._embeddings[: self.size]

    def prefix_norms(self, layer: int) -> FloatArray:
        """Return the Euclidean norm of rows 0..layer of every stored map, shape (size,)."""
        return self._prefix_norms[layer, : self.size]

    @property
    def map_bytes(self) -> int:
        """Bytes of the maps, as figure 18 of the paper counts them."""
        return self._maps.nbytes

    @property
    def total_bytes(self) -> int:
        """Bytes of maps, embeddings and the norms kept for the search."""
        return self._maps.nbytes + self._embeddings.nbytes + self._prefix_norms.nbytes

    def add(self, expert_map: FloatArray, embedding: FloatArray) -> int:
        """Remember an iteration, replacing the most redundant one if full; return its entry."""
        entry = self.size
        if self.size == self.capacity:
            entry = int(self.redundancy(expert_map, embedding).argmax())
        else:
            self.size += 1
        self._maps[:, entry] = expert_map
        self._embeddings[entry] = unit(embedding)
        self._prefix_norms[:, entry] = np.sqrt(np.cumsum((expert_map**2).sum(axis=1)))
        return entry

    def redundancy(self, expert_map: FloatArray, embedding: FloatArray) -> FloatArray:
        """Return RDY of a new iteration against every stored one, shape (size,)."""
        semantic = self.embeddings @ unit(embedding)
        dots = np.matmul(self._maps[:, : self.size], expert_map[:, :, None])[..., 0].sum(axis=0)
        trajectory = dots / (self.prefix_norms(-1) * np.linalg.norm(expert_map))
        share = np.float32(self._semantic_share)
        redundancy: FloatArray = share * semantic + (1 - share) * trajectory
        return redundancy

    def save(self, path: Path, model_id: str) -> None:
        """Write the stored iterations as safetensors, marked with the model they belong to."""
        arrays = {
            "maps": np.ascontiguousarray(self._maps[:, : self.size].swapaxes(0, 1)),
            "embeddings": self.embeddings.copy(),
        }
        partial = path.with_name(f"{path.name}.partial")
        save_file(arrays, partial, metadata={"model_id": model_id})
        os.replace(partial, path)

    def load(self, path: Path, model_id: str) -> None:
        """Add the iterations of a file, in the order of its entries.

        Raises StoreMismatch if the file was saved for another model or is no store file.
        """
        try:
            with safe_open(path, "numpy") as file:
                saved_for = (file.metadata() or {}).get("model_id")
                maps, embeddings = file.get_tensor("maps"), file.get_tensor("embeddings")
        except (SafetensorError, OSError) as error:
            raise StoreMismatch(f"{path} is no expert map store ({error})") from error
        expected = ((self.shape.layers, self.shape.experts), (self.shape.hidden_size,))
        found = (maps.shape[1:], embeddings.shape[1:])
        if saved_for != model_id or found != expected or len(maps) != len(embeddings):
            raise StoreMismatch(f"{path} holds expert maps of {saved_for}, not of {model_id}")
        for expert_map, embedding in zip(maps, embeddings, strict=True):
            self.add(expert_map, embedding)


def unit(vector: FloatArray) -> FloatArray:
    """Return vectors scaled to unit length along the last axis; zero stays zero."""
    norms = np.linalg.norm(vector, axis=-1, keepdims=True)
    scaled: FloatArray = vector / np.maximum(norms, np.finfo(np.float32).tiny)
    return scaled
