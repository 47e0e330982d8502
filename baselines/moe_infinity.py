"""MoE-Infinity (arXiv 2401.14361): prefetch what the most similar past request activated.

A request's expert activation matrix (EAM, L x J) counts its tokens per expert, over its prompt and
its decoded tokens. Finished requests' matrices form a collection of bounded size. After every gate
the running request's matrix is compared with all of them, and the nearest one's activation ratios,
damped by how far ahead a layer lies, rank what is prefetched. Prediction is on the critical path,
copies are not (section 6.1 of the FineMoE paper).

File names below are those of the original code, TorchMoE/MoE-Infinity. `variant` chooses where its
description and its code differ:

| | paper | code |
|---|---|---|
| compared rows | all of the request so far | those after the current layer (expert_tracer.py) |
| decay, l_now to l | 1 - (l - l_now) / L | 1 - (l - l_now) / (L + 1) (expert_predictor.py) |
| experts of ratio zero | not asked for | asked for last (1e-8, expert_predictor.py) |
| a full collection replaces | the most similar matrix | the least often matched one of those |
| | | that were added while serving (expert_tracer.py) |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finemoe.expert_map import StoreMismatch, unit
from finemoe.offload.eviction import UsageTable
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
    PrefetchTable,
    Wishes,
)

UNSEEN_RATIO = 1e-8
"""What the code adds to every ratio before the decay (expert_predictor.py)."""
SMALLEST_ACTIVITY = 1e-6
"""What the code adds to every factor of the cache priority (expert_priority_score.py)."""
PROTECTED = 1e9
"""Above the magnitude of any eviction key: what is to be prefetched leaves after all else."""


@dataclass(frozen=True)
class MoEInfinityOptions:
    """What the originals fix, and where they differ. Raises ValueError for a wrong value."""

    early_layers: int
    """Layers whose popular experts are prefetched before layer 0; as many as FineMoE's d."""
    capacity: int = 1000
    """Matrices in the collection (`trace_capacity` in moe_infinity/utils/config.py)."""
    variant: Literal["paper", "code"] = "paper"
    eviction: Literal["activation", "lfu", "lru"] = "activation"
    """Activation ratio x layer decay (expert_priority_score.py), or plain counts or recency."""
    horizon: int | None = None
    """Layers ahead that are asked for; None: all that are left, as the originals do."""
    online_growth: bool = True
    """Whether requests enter the collection while serving (`finish_entry`, expert_tracer.py)."""

    def __post_init__(self) -> None:
        if self.early_layers < 1 or self.capacity < 1:
            raise ValueError("early_layers and capacity start at 1")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError("horizon starts at 1, or is null for all layers")
        if self.variant not in ("paper", "code"):
            raise ValueError(f"variant={self.variant} is none of paper, code")
        if self.eviction not in ("activation", "lfu", "lru"):
            raise ValueError(f"eviction={self.eviction} is none of activation, lfu, lru")


class MatrixCollection:
    """Up to `capacity` activation matrices (L, J) of finished requests.

    Two matrices are as similar as the mean, over the layers, of the cosines of their rows
    (`find_most_similar`, expert_tracer.py); a layer without tokens counts as zero.
    """

    def __init__(self, shape: ModelShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.size = 0
        self.matches = np.zeros(capacity, dtype=np.int64)
        """How often each matrix was the nearest one."""
        self.popularity = np.zeros((shape.layers, shape.experts))
        """Tokens of all stored requests per expert."""
        self._prepared = 0
        self._matrices = np.zeros((capacity, shape.layers, shape.experts), dtype=np.float32)
        self._ratios = np.zeros_like(self._matrices)
        self._rows = np.zeros((shape.layers, capacity, shape.experts), dtype=np.float32)

    @property
    def matrices(self) -> FloatArray:
        """The stored matrices, shape (size, L, J)."""
        return self._matrices[: self.size]

    def rows(self, layer: int) -> FloatArray:
        """Return row `layer` of every stored matrix scaled to unit length, shape (size, J)."""
        return self._rows[layer, : self.size]

    def ratios(self, entry: int) -> FloatArray:
        """Return the share of each expert among its layer's activations, shape (L, J)."""
        return self._ratios[entry]

    @property
    def matrix_bytes(self) -> int:
        return self._matrices.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices and of what is kept for the search."""
        return self._matrices.nbytes + self._ratios.nbytes + self._rows.nbytes

    def keep_all(self) -> None:
        """Keep what is stored now from being the least matched (`persistent_capacity`)."""
        self._prepared = self.size

    def similarity(self, matrix: FloatArray) -> FloatArray:
        """Return the similarity of a matrix (L, J) to every stored one, shape (size,)."""
        cosines = np.matmul(self._rows[:, : self.size], unit(matrix)[:, :, None])[..., 0]
        similarity: FloatArray = cosines.mean(axis=0)
        return similarity

    def add(self, matrix: FloatArray, replace: Literal["similar", "unmatched"]) -> int | None:
        """Store a matrix and return its entry; None if it was full of matrices to be kept."""
        entry = self._place(matrix, replace)
        if entry is None:
            return None
        self.popularity += matrix - self._matrices[entry]
        self._matrices[entry] = matrix
        self._ratios[entry] = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        self._rows[:, entry] = unit(matrix)
        self.matches[entry] = 1
        return entry

    def _place(self, matrix: FloatArray, replace: str) -> int | None:
        if self.size < self.capacity:
            self.size += 1
            return self.size - 1
        if replace == "similar":
            return int(self.similarity(matrix).argmax())
        if self._prepared == self.size:
            return None
        return self._prepared + int(self.matches[self._prepared :].argmin())

    def save(self, path: Path, model_id: str) -> None:
        """Write the matrices as safetensors, marked with the model they belong to."""
        partial = path.with_name(f"{path.name}.partial")
        save_file({"matrices": self.matrices.copy()}, partial, metadata={"model_id": model_id})
        os.replace(partial, path)

    def load(self, path: Path, model_id: str, replace: Literal["similar", "unmatched"]) -> None:
        """Add the matrices of a file, in its order.

        Raises StoreMismatch if the file was saved for another model or is no such file.
        """
        try:
            with safe_open(path, "numpy") as file:
                saved_for = (file.metadata() or {}).get("model_id")
                matrices = file.get_tensor("matrices")
        except (SafetensorError, OSError) as error:
            raise StoreMismatch(f"{path} is no collection of matrices ({error})") from error
        if saved_for != model_id or matrices.shape[1:] != self._matrices.shape[1:]:
            raise StoreMismatch(f"{path} holds matrices of {saved_for}, not of {model_id}")
        for matrix in matrices:
            self.add(matrix, replace)


class RunningRequest:
    """The matrix of a request under way, and the cosine of each row with every stored row.

    Only the current layer's row changes at a gate, so sums over the layers are carried along.
    """

    def __init__(self, collection: MatrixCollection) -> None:
        shape = collection.shape
        self.matrix = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        self._collection = collection
        self._cosines = np.zeros((shape.layers, collection.capacity), dtype=np.float32)
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Sum up anew, so that rounding errors do not pile up."""
        self._observed: FloatArray = self._cosines.sum(axis=0)
        self._later: FloatArray = self._observed.copy()

    def refresh(self, entry: int) -> None:
        """Compare with a matrix that was stored after this request had begun."""
        stored = self._collection.matrices[entry]
        self._cosines[:, entry] = (unit(stored) * unit(self.matrix)).sum(axis=1)

    def count(self, layer: int, tokens: NDArray[np.integer] | FloatArray) -> None:
        """Add one gate's tokens per expert, shape (J,)."""
        row = self.matrix[layer]
        row += tokens
        length = float(np.sqrt(row @ row))
        new = self._collection.rows(layer) @ (row / max(length, 1e-30))
        size = self._collection.size
        old = self._cosines[layer, :size]
        self._later[:size] -= old
        self._observed[:size] += new - old
        self._cosines[layer, :size] = new

    def nearest(self, variant: Literal["paper", "code"]) -> int:
        """Return the most similar stored matrix, by all rows or (code) by those not yet due."""
        sums = self._observed if variant == "paper" else self._later
        return int(sums[: self._collection.size].argmax())


@dataclass(frozen=True)
class _Ranked:
    """Eviction keys that hold until the next gate, use or load; all arrays (L, J)."""

    keys: NDArray[np.float64]
    ahead: NDArray[np.float64]
    """What is wanted of later layers, -inf elsewhere."""
    wanted: NDArray[np.float64]
    stamp: tuple[int, int]
    """The layer and the number of events that they were made at."""


class MoEInfinityPolicy(Policy):
    """Keeps one matrix a request, and prefetches all later layers of the nearest stored one."""

    placement = Placement("critical_path")

    def __init__(self, shape: ModelShape, options: MoEInfinityOptions) -> None:
        self.shape = shape
        self.options = options
        self.collection = MatrixCollection(shape, options.capacity)
        self._replace: Literal["similar", "unmatched"] = (
            "similar" if options.variant == "paper" else "unmatched"
        )
        self._growing = True
        self._running: dict[int, RunningRequest] = {}
        self._served: tuple[int, ...] = ()
        steps = shape.layers if options.variant == "paper" else shape.layers + 1
        self._decay = 1 - np.arange(shape.layers + 1)[:, None] / steps
        """How much a prediction counts, by how many layers it looks ahead."""
        self._front = 1 - np.arange(shape.layers)[:, None] / shape.layers
        """Cache priority of a layer: the front ones have least time to be prefetched."""
        self.begin_cache()

    def begin_cache(self) -> None:
        """Forget what the cache saw."""
        self._usage = UsageTable(self.shape)
        self._activity = np.full((self.shape.layers, self.shape.experts), 1 / self.shape.experts)
        self._wanted = np.zeros((self.shape.layers, self.shape.experts))
        self._now = -1
        self._events = 0
        self._ranked: _Ranked | None = None

    def begin_serving(self) -> None:
        self._growing = self.options.online_growth
        self.collection.keep_all()
        self.begin_cache()

    def save(self, path: Path, model_id: str) -> None:
        self.collection.save(path, model_id)

    def load(self, path: Path, model_id: str) -> None:
        self.collection.load(path, model_id, self._replace)

    def memory_bytes(self) -> dict[str, int]:
        collection = self.collection
        return {
            "matrices": collection.matrix_bytes,
            "store": collection.nbytes,
        }

    # Predictions ------------------------------------------------------------------------------

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Wishes:
        """Ask for the K most popular experts of the early layers, which no gate foretells."""
        requests = [self._request(number) for number in iteration.requests]
        for request in requests:
            request.begin_iteration()
        if iteration.requests != self._served:
            self._served = iteration.requests
            for layer, row in enumerate(np.sum([request.matrix for request in requests], axis=0)):
                self._note_activity(layer, row)
        wanted = np.zeros_like(self._wanted)
        if self.collection.size:
            early = self.collection.popularity[: self.options.early_layers]
            popular = (-early).argsort(axis=1, kind="stable")[:, : self.shape.top_k]
            shares = early / np.maximum(early.sum(axis=1, keepdims=True), 1)
            kept = np.take_along_axis(shares, popular, axis=1) * self._decay[1 : len(early) + 1]
            np.put_along_axis(wanted[: len(early)], popular, kept, axis=1)
        self._now, self._wanted = -1, wanted
        return PrefetchTable(wanted)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Wishes:
        requests = [self._request(number) for number in iteration.requests]
        for request, tokens in zip(requests, self._tokens(iteration, gate), strict=True):
            request.count(gate.layer, tokens)
        rows = [request.matrix[gate.layer] for request in requests]
        self._note_activity(gate.layer, rows[0] if len(rows) == 1 else np.sum(rows, axis=0))
        first = gate.layer + 1
        if not self.collection.size or first == self.shape.layers:
            return ()
        last = first + (self.options.horizon or self.shape.layers)
        wanted = np.zeros_like(self._wanted)
        wanted[first:last] = self._ratios(requests)[first:last]
        if self.options.variant == "code":
            wanted[first:last] += UNSEEN_RATIO
        wanted[first:] *= self._decay[1 : self.shape.layers - gate.layer]
        self._wanted = wanted
        return PrefetchTable(wanted)

    def end_request(self, request: int) -> None:
        """Store what the request activated, and compare the others with it."""
        finished = self._running.pop(request, None)
        if finished is None or not self._growing:
            return
        entry = self.collection.add(finished.matrix, self._replace)
        if entry is not None:
            for other in self._running.values():
                other.refresh(entry)

    def _request(self, number: int) -> RunningRequest:
        if number not in self._running:
            self._running[number] = RunningRequest(self.collection)
        return self._running[number]

    def _tokens(self, iteration: Iteration, gate: Gate) -> Iterable[FloatArray]:
        """Yield each request's tokens per expert, shape (J,): the K best of every token."""
        experts = self.shape.experts
        if len(gate.probabilities) == 1:
            tokens = np.zeros(experts, dtype=np.float32)
            tokens[list(gate.activated)] = 1
            yield tokens
            return
        chosen = (-gate.probabilities).argsort(axis=1, kind="stable")[:, : self.shape.top_k]
        for rows in iteration.rows():
            yield np.bincount(chosen[rows].ravel(), minlength=experts).astype(np.float32)

    def _ratios(self, requests: Sequence[RunningRequest]) -> FloatArray:
        """Return the nearest matrix's ratios; of several requests the largest, (L, J)."""
        entries = [request.nearest(self.options.variant) for request in requests]
        for entry in entries:
            self.collection.matches[entry] += 1
        ratios = self.collection.ratios(entries[0])
        for entry in entries[1:]:
            ratios = np.maximum(ratios, self.collection.ratios(entry))
        return ratios

    # Cache ------------------------------------------------------------------------------------

    def _note_activity(self, layer: int, tokens: FloatArray) -> None:
        """Keep the running requests' share of each expert; a layer not yet seen is uniform."""
        total = float(tokens.sum())
        self._activity[layer] = tokens / total if total else 1 / self.shape.experts
        self._events += 1

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._usage.on_outcome(outcome)
        self._now = outcome.layer
        self._events += 1

    def on_load(self, expert: ExpertId) -> None:
        self._usage.on_load(expert)
        self._events += self.options.eviction != "activation"

    def eviction_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        """Evict the smallest activation ratio x (1 - l / L), from expert_priority_score.py.

        Experts to be prefetched leave last, and never for a prefetch that is less urgent: the
        code does not evict its cache candidates (core/prefetch/task_scheduler.cpp).
        """
        now, wanted, events = self._now, self._wanted, self._events
        ranked = self._ranked
        if ranked is None or ranked.wanted is not wanted or ranked.stamp != (now, events):
            ranked = self._ranked = self._rank(wanted, now, events)
        if incoming.layer <= now:
            return ranked.keys
        return np.where(ranked.ahead >= wanted[incoming], -np.inf, ranked.keys)

    def _rank(self, wanted: NDArray[np.float64], now: int, events: int) -> _Ranked:
        if self.options.eviction == "lru":
            keys = self._usage.lru_keys()
        elif self.options.eviction == "lfu":
            keys = self._usage.lfu_keys()
        else:
            keys = -(self._activity + SMALLEST_ACTIVITY) * self._front
        ahead = np.where(wanted > 0, wanted, -np.inf)
        ahead[: now + 1] = -np.inf
        return _Ranked(np.where(ahead > 0, -PROTECTED - wanted, keys), ahead, wanted, (now, events))


def moe_infinity(shape: ModelShape, **options: int | str | bool | None) -> MoEInfinityPolicy:
    """Return the policy for `MoEInfinityOptions` given one by one, as its YAML does."""
    return MoEInfinityPolicy(shape, MoEInfinityOptions(**options))  # type: ignore[arg-type]
