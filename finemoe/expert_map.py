"""Expert maps, the store that remembers them, and the searches in it (sections 4.1, 4.2, 4.4)."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from finemoe.files import atomic_write, cause_of
from finemoe.offload.policy import FloatArray, ModelShape

TOLERANCE = 1e-2  # how far what adds up to 1 may be from it, rounded as it is
LARGEST = 2.0**24  # up to here float32 counts by ones; nothing that a policy keeps comes near it
SMALLEST_NORM = np.finfo(np.float32).tiny


class ExpertMapStore:
    """Up to `capacity` iterations: an expert map (L, J) and a semantic embedding (h,) each.

    An expert map holds the gate's full softmax of every layer. When the store is full, the stored
    iteration most redundant with the new one is replaced: RDY = d/L * score_sem + (L-d)/L *
    score_traj, both cosines (section 4.4). Arrays have entries as their last axis, along which a
    product of few queries with all entries is quickest.
    """

    def __init__(self, shape: ModelShape, capacity: int, prefetch_distance: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.size = 0
        self._semantic_share = np.float32(min(prefetch_distance, shape.layers) / shape.layers)
        self._maps = np.zeros((shape.layers, shape.experts, capacity), dtype=np.float32)
        self._embeddings = np.zeros((shape.hidden_size, capacity), dtype=np.float32)
        self._prefix_norms = np.zeros((shape.layers, capacity), dtype=np.float32)
        self._of_prompt = np.zeros(capacity, dtype=bool)

    @property
    def maps(self) -> FloatArray:
        """Every stored map, shape (L, J, size)."""
        return self._maps[:, :, : self.size]

    @property
    def embeddings(self) -> FloatArray:
        """Stored embeddings scaled to unit length, shape (h, size)."""
        return self._embeddings[:, : self.size]

    @property
    def prefix_norms(self) -> FloatArray:
        """Euclidean norms of rows 0..l of every stored map, shape (L, size)."""
        return self._prefix_norms[:, : self.size]

    def expert_map(self, entry: int) -> FloatArray:
        return self._maps[:, :, entry]

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes of the maps, as figure 18 of the paper counts them, and of all."""
        maps = self._maps.nbytes
        return {"maps": maps, "store": maps + self._embeddings.nbytes + self._prefix_norms.nbytes}

    def counts(self) -> dict[str, int]:
        """Return how many iterations it holds, and how many of prompts; files do not tell these."""
        return {"entries": self.size, "of_prompts": int(self._of_prompt.sum())}

    def cosines(self, embeddings: FloatArray) -> FloatArray:
        """Return score_sem of embeddings (B, h) with every stored one, shape (B, size)."""
        return unit(embeddings) @ self.embeddings

    def running_dots(
        self, rows: FloatArray, first: int = 0, before: FloatArray | float = 0.0
    ) -> FloatArray:
        """Return dot products with every stored map over rows 0..l, (N, B, J) to (N, B, size).

        Rows are those of N layers from `first` on; `before` is what earlier layers add up to.
        """
        dots: FloatArray = np.matmul(rows, self.maps[first : first + len(rows)])
        dots[0] += before
        # One layer after the other, as a search adds them up; np.cumsum takes five times as long.
        for earlier, later in itertools.pairwise(dots):
            later += earlier
        return dots

    def redundancy(
        self,
        rows: FloatArray,
        embeddings: FloatArray,
        cosines: FloatArray | None = None,
        dots: FloatArray | None = None,
    ) -> FloatArray:
        """Return RDY of new iterations, rows (L, B, J), with every stored one, shape (B, size).

        `cosines` and `dots` over all layers, both (B, size), spare their computation.
        """
        if cosines is None:
            cosines = self.cosines(embeddings)
        if dots is None:
            dots = self.running_dots(rows)[-1]
        maps = rows.swapaxes(0, 1).reshape(len(embeddings), -1)
        norms = np.sqrt(np.vecdot(maps, maps))[:, None] * self.prefix_norms[-1]
        share = self._semantic_share
        return share * cosines + (1 - share) * (dots / norms)

    def _among(self, rows: FloatArray, embeddings: FloatArray) -> FloatArray:
        """Return RDY of iterations, rows (L, B, J), with each other, shape (B, B)."""
        maps = unit(rows.swapaxes(0, 1).reshape(len(embeddings), -1))
        directions, share = unit(embeddings), self._semantic_share
        return share * (directions @ directions.T) + (1 - share) * (maps @ maps.T)

    def add(self, expert_map: FloatArray, embedding: FloatArray) -> int:
        """Remember an iteration, replacing the most redundant one if full; return its entry."""
        return self.add_all(expert_map[:, None], embedding[None])[0]

    def add_all(
        self,
        rows: FloatArray,
        embeddings: FloatArray,
        cosines: FloatArray | None = None,
        dots: FloatArray | None = None,
        of_prompt: bool = False,
    ) -> list[int]:
        """Remember iterations, rows (L, B, J), one after the other; return their entries."""
        batch, size = len(embeddings), self.size
        redundancy = np.zeros((batch, self.capacity), dtype=np.float32)
        overflows = size + batch > self.capacity
        if overflows:
            redundancy[:, :size] = self.redundancy(rows, embeddings, cosines, dots)
        among = self._among(rows, embeddings) if overflows and batch > 1 else None
        entries = []
        for one, embedding in enumerate(unit(embeddings)):
            if self.size < self.capacity:
                entry = self.size
                self.size += 1
            else:
                entry = int(redundancy[one].argmax())
            expert_map = rows[:, one]
            self._maps[:, :, entry] = expert_map
            self._embeddings[:, entry] = embedding
            self._of_prompt[entry] = of_prompt
            self._prefix_norms[:, entry] = np.sqrt(np.cumsum((expert_map**2).sum(axis=1)))
            entries.append(entry)
            if among is not None:
                redundancy[one + 1 :, entry] = among[one + 1 :, one]
        return entries

    def save(self, path: Path, model_id: str) -> None:
        arrays = {
            "maps": np.ascontiguousarray(self.maps.transpose(2, 0, 1)),
            "embeddings": np.ascontiguousarray(self.embeddings.T),
        }
        write_arrays(path, {"model_id": model_id}, arrays)

    def load(self, path: Path, model_id: str) -> None:
        maps, embeddings = read_arrays(
            path,
            {"model_id": model_id},
            maps=("entries", self.shape.layers, self.shape.experts),
            embeddings=("entries", self.shape.hidden_size),
        )
        if (maps < 0).any() or (abs(maps.sum(axis=2) - 1) > TOLERANCE).any():
            raise ValueError(f"{path} holds maps whose rows are no probabilities")
        if (np.vecdot(embeddings, embeddings) > 1 + TOLERANCE).any():
            raise ValueError(f"{path} holds embeddings that are longer than 1")
        for expert_map, embedding in zip(maps, embeddings, strict=True):
            self.add(expert_map, embedding)


class Matches(NamedTuple):
    """The stored iteration nearest to each query, and the cosine between them, (..., B) each."""

    entries: NDArray[np.intp]
    scores: NDArray[np.float64]

    def after(self, gates: slice | list[int]) -> Self:
        """Return those after some of the gates, which are the first axis."""
        return type(self)(self.entries[gates], self.scores[gates])


def nearest(scores: FloatArray, norms: FloatArray | float = 1.0) -> Matches:
    """Return the best entries by scores (..., B, size), which are divided by norms (..., B); of
    cosines with embeddings that is the semantic search (4.2.1)."""
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


def write_arrays(path: Path, facts: Mapping[str, str], arrays: dict[str, FloatArray]) -> None:
    """Write a safetensors file that says `facts` of itself."""
    with atomic_write(path) as partial:
        partial.write_bytes(save(arrays, metadata=dict(facts)))


def read_arrays(
    path: Path, facts: Mapping[str, str], **shapes: tuple[int | str, ...]
) -> list[FloatArray]:
    """Return the arrays of a safetensors file that have these names, in their order.

    A dimension is a size, or a name for one that is the same wherever the name stands. Raises
    ValueError unless the file says all of `facts` of itself, and its arrays are float32, of
    these shapes, and without NaN, infinity or anything beyond `LARGEST`.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = [file.get_tensor(name) for name in shapes]
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        names = ", ".join(shapes)
        raise ValueError(f"{path} cannot be read as {names} ({cause_of(error)})") from error
    for name, value in facts.items():
        if metadata.get(name) != value:
            raise ValueError(f"{path} is for {name} {metadata.get(name)!r}, not {value!r}")
    sizes: dict[str, int] = {}
    for array, (name, shape) in zip(arrays, shapes.items(), strict=True):
        pairs = zip(shape, array.shape, strict=False)
        due = tuple(n if isinstance(n, int) else sizes.setdefault(n, m) for n, m in pairs)
        if array.dtype != np.float32 or len(shape) != array.ndim or array.shape != due:
            found = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{path} holds {name} as {found}, not float32 of {shape}")
        if not (abs(array) <= LARGEST).all():
            raise ValueError(f"{path} holds {name} that are not all numbers up to {LARGEST:g}")
    return arrays


def unit(vector: FloatArray) -> FloatArray:
    """Return vectors scaled to unit length along the last axis; zero stays zero."""
    norms = np.sqrt((vector * vector).sum(axis=-1, keepdims=True))
    return vector / np.maximum(norms, SMALLEST_NORM)
