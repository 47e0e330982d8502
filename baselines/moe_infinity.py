"""MoE-Infinity (arXiv 2401.14361): prefetch what the most similar past request activated.

A request's activation matrix (L x J) counts its tokens per expert, over its prompt and its decoded
tokens. After every gate the running request's is compared with those of all finished ones, and the
nearest one's activation ratios, damped by how far ahead a layer lies, rank what is prefetched.
Prediction is on the critical path (section 6.1 of the FineMoE paper).

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

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import validate_call

from finemoe.expert_map import read_arrays, unit, write_arrays
from finemoe.offload.eviction import UsageTable
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    Iteration,
    ModelShape,
    Placement,
    Priorities,
    Table,
)
from finemoe.options import CHECKED, Count, Flag
from finemoe.selection import top_experts

UNSEEN_RATIO = 1e-8  # what the code adds to every ratio before the decay (expert_predictor.py)
SMALLEST_ACTIVITY = 1e-6  # added to a ratio, so that layers tell even unused experts apart
Variant = Literal["paper", "code"]
Prefetching = Literal["asynchronous", "awaited", "awaited_next_layer", "awaited_at_distance"]


class MatrixCollection:
    """Up to `capacity` activation matrices (L, J) of finished requests.

    Two matrices are as similar as the mean, over the layers, of the cosines of their rows
    (`find_most_similar`, expert_tracer.py); a layer without tokens counts as zero.
    """

    def __init__(self, shape: ModelShape, capacity: int, variant: Variant) -> None:
        self.shape = shape
        self.capacity = capacity
        self.variant = variant
        self.size = 0
        self.matches = np.zeros(capacity, dtype=np.int64)  # how often each was the nearest
        self.popularity = np.zeros((shape.layers, shape.experts))
        """Tokens of all stored requests per expert."""
        self.additions = 0
        self._prepared = 0
        self._matrices = np.zeros((capacity, shape.layers, shape.experts), dtype=np.float32)
        self.ratios = np.zeros_like(self._matrices)
        """Each expert's share of its layer's activations, shape (capacity, L, J)."""
        self._rows = np.zeros((shape.layers, capacity, shape.experts), dtype=np.float32)

    @property
    def matrices(self) -> FloatArray:
        """The stored matrices, shape (size, L, J)."""
        return self._matrices[: self.size]

    def rows(self, layers: slice) -> FloatArray:
        """Return rows of every stored matrix scaled to unit length, shape (layers, size, J)."""
        return self._rows[layers, : self.size]

    def memory_bytes(self) -> dict[str, int]:
        matrices = self._matrices.nbytes
        return {"matrices": matrices, "store": matrices + self.ratios.nbytes + self._rows.nbytes}

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
        elif self.variant == "paper":
            entry = int(self.similarity(matrix).argmax())
        elif self._prepared < self.size:
            entry = self._prepared + int(self.matches[self._prepared :].argmin())
        else:
            return None
        self.popularity += matrix - self._matrices[entry]
        self._matrices[entry] = matrix
        self.ratios[entry] = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
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
            raise ValueError(f"{path} holds matrices that do not count tokens")
        for matrix in matrices:
            self.add(matrix)


class RunningRequest:
    """The matrix of a request under way, and each row's cosine with every stored row, summed up."""

    def __init__(self, collection: MatrixCollection) -> None:
        shape = collection.shape
        self.matrix = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        self._collection = collection
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
        changes = cosines - known if self._collection.variant == "paper" else -known
        known[:] = cosines
        carried = self._sums[: self._collection.size]
        changes[0] += carried
        sums: FloatArray = changes.cumsum(axis=0)
        carried[:] = sums[-1]
        return sums


class MoEInfinityPolicy(UsageTable):
    """Keeps one matrix a request, and prefetches all later layers of the nearest stored one.

    `eviction` says who leaves: the least visited, the most visited (`scheduler`, the code's
    core/prefetch/task_scheduler.cpp), the least active (our own: the running requests' activation
    ratio x layer decay, two of the three factors of expert_priority_score.py, which nobody calls),
    or the least recently used. `prefetching` says whether a layer waits for prefetches: for all, or
    for K of the next layer or of the layer `early_layers` on. docs/fidelity.md weighs them.
    """

    @validate_call(config=CHECKED)
    def __init__(
        self,
        shape: ModelShape,
        early_layers: Count,  # whose popular experts come before layer 0; as many as FineMoE's d
        capacity: Count = 1000,  # matrices (`trace_capacity`, moe_infinity/utils/config.py)
        variant: Variant = "paper",
        eviction: Literal["lfu", "scheduler", "activation", "lru"] = "lfu",
        prefetching: Prefetching = "awaited_next_layer",
        horizon: Count | None = None,  # layers ahead that are asked for; None: all of them
        online_growth: Flag = True,  # served requests join (`finish_entry`, expert_tracer.py)
    ) -> None:
        self.shape = shape
        self._early, self._eviction = early_layers, eviction
        self._online_growth = online_growth
        few = {"awaited_next_layer": 1, "awaited_at_distance": early_layers}
        distance = few.get(prefetching)
        self.placement = Placement(
            "critical_path",
            awaited=prefetching != "asynchronous",
            awaits=(distance, shape.top_k) if distance else None,
        )
        self.history = self.collection = MatrixCollection(shape, capacity, variant)
        self._growing = True
        self._running: dict[int, RunningRequest] = {}
        layers = np.arange(shape.layers)
        ahead = (layers - layers[:, None])[:, :, None]
        self._steps = shape.layers if variant == "paper" else shape.layers + 1
        within = (ahead > 0) & (ahead <= (horizon or shape.layers))
        self._decay = np.where(within, 1 - ahead / self._steps, 0)
        """How much a prediction counts, by the layer that it is made at and the one it is for."""
        self._front = 1 - layers[:, None] / shape.layers
        """Cache priority of a layer: the front ones have least time to be prefetched."""
        uniform = np.full((shape.layers, shape.experts), 1 / shape.experts)
        self._unseen = -(uniform + SMALLEST_ACTIVITY) * self._front
        self._popular = (-1, np.zeros((shape.layers, shape.experts)))
        self.forget()

    def forget(self) -> None:
        super().forget()
        self._served: tuple[int, ...] = ()
        self._activity = self._unseen.copy()  # eviction keys by how active an expert is
        self._ahead: list[tuple[Priorities | None, Table]] = []

    def begin_serving(self) -> None:
        self._growing = self._online_growth
        self.collection.keep_all()
        super().begin_serving()

    def learn(self, iteration: Iteration, embeddings: FloatArray, gates: Gates) -> None:
        for request in self._requests(iteration):
            request.begin_iteration()
        self._count(iteration, slice(0, self.shape.layers), gates)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        """Ask for the K most popular experts of the early layers, which no gate predicts."""
        requests = self._requests(iteration)
        for request in requests:
            request.begin_iteration()
        if iteration.requests != self._served:
            self._served = iteration.requests
            tokens = _tokens_of(requests, slice(0, self.shape.layers))
            seen = tokens.any(axis=1, keepdims=True)
            self._activity = np.where(seen, self._activity_keys(tokens), self._unseen)
        if self._popular[0] != self.collection.additions:
            self._popular = (self.collection.additions, self._popular_experts())
        self._ahead = []
        return self._popular[1]

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        self._ahead = self._answers(iteration, slice(0, self.shape.layers), gates)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        if self._ahead:
            wanted, activity = self._ahead[gate.layer]
        else:
            gates = Gates(gate.probabilities[None], [gate.activated], None)
            layers = slice(gate.layer, gate.layer + 1)
            ((wanted, activity),) = self._answers(iteration, layers, gates)
        self._activity[gate.layer] = activity
        return wanted

    def end_request(self, request: int) -> None:
        """Store what the request activated, and compare the others with it."""
        finished = self._running.pop(request, None)
        if finished is None or not self._growing:
            return
        entry = self.collection.add(finished.matrix)
        if entry is not None:
            for other in self._running.values():
                other.refresh(entry)

    def _requests(self, iteration: Iteration) -> list[RunningRequest]:
        for number in iteration.requests:
            if number not in self._running:
                self._running[number] = RunningRequest(self.collection)
        return [self._running[number] for number in iteration.requests]

    def _popular_experts(self) -> Priorities:
        wanted = np.zeros((self.shape.layers, self.shape.experts))
        early = self.collection.popularity[: self._early]
        if self.collection.size:
            shares = early / np.maximum(early.sum(axis=1, keepdims=True), 1)
            wanted[: len(early)] = self._early_priorities(shares)
        return wanted

    def _early_priorities(self, shares: Table) -> Priorities:
        """Return what is asked for of the early layers, by their experts' shares of all tokens."""
        decay = 1 - np.arange(1, len(shares) + 1)[:, None] / self._steps
        return np.where(top_experts(shares, self.shape.top_k), shares * decay, 0.0)

    def _answers(
        self, iteration: Iteration, layers: slice, gates: Gates
    ) -> list[tuple[Priorities | None, Table]]:
        """Return what each gate of consecutive layers requests, and its layer's eviction keys."""
        nearest = self._count(iteration, layers, gates)
        rows = self._activity_keys(_tokens_of(self._requests(iteration), layers), layers.start)
        requests: list[Priorities | None] = [None] * len(rows)
        if nearest:
            wanted = self._wanted_by(nearest, layers)[: self.shape.layers - 1 - layers.start]
            requests[: len(wanted)] = list(wanted)
        return list(zip(requests, rows, strict=True))

    def _count(self, iteration: Iteration, layers: slice, gates: Gates) -> list[NDArray[np.intp]]:
        """Take note of the gates' tokens; return each request's nearest entry, by gate, or none."""
        counted = zip(self._requests(iteration), self._tokens(iteration, gates), strict=True)
        similarities = [request.count(layers, tokens) for request, tokens in counted]
        if not self.collection.size:
            return []
        nearest = [similarity.argmax(axis=1) for similarity in similarities]
        for entries in nearest:
            # The last gate looks for nothing.
            for entry in entries[: self.shape.layers - 1 - layers.start].tolist():
                self.collection.matches[entry] += 1
        return nearest

    def _tokens(self, iteration: Iteration, gates: Gates) -> FloatArray:
        """Return each request's tokens per expert, (B, layers, J): the K best of every token."""
        layers, tokens, experts = gates.probabilities.shape
        if tokens == 1:
            counts = np.zeros((1, layers, experts), dtype=np.float32)
            for row, activated in zip(counts[0], gates.activated, strict=True):
                for index in activated:
                    row[index] = 1
            return counts
        best = top_experts(gates.probabilities, self.shape.top_k)
        return np.stack([best[:, rows].sum(axis=1, dtype=np.float32) for rows in iteration.rows()])

    def _wanted_by(self, nearest: Sequence[NDArray[np.intp]], layers: slice) -> Priorities:
        """Return what each gate requests, (layers, L, J): the largest of the nearest's ratios."""
        ratios = reduce(np.maximum, [self.collection.ratios[entries] for entries in nearest])
        wanted = ratios.astype(np.float64)
        if self.collection.variant == "code":
            wanted += UNSEEN_RATIO
        wanted *= self._decay[layers]
        return wanted

    def _activity_keys(self, tokens: FloatArray, first: int = 0) -> Table:
        """Return -(activation ratio + 1e-6) x (1 - l / L) of layers `first` on, by all tokens."""
        shares = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
        activity = shares.astype(np.float64) + SMALLEST_ACTIVITY
        return -activity * self._front[first : first + len(tokens)]

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        if self._eviction == "lfu":
            return super().eviction_keys(incoming, urgent)
        orders = {"activation": self._activity, "scheduler": self.visits, "lru": self._recency}
        return orders[self._eviction]


def _tokens_of(requests: Sequence[RunningRequest], layers: slice) -> FloatArray:
    """Return the tokens of all requests per expert, shape (layers, J)."""
    first, *others = (request.matrix[layers] for request in requests)
    return sum(others, start=first)


moe_infinity = MoEInfinityPolicy  # the name in conf/system
