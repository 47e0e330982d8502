"""MoE-Infinity (arXiv 2401.14361): prefetch what the most similar past request activated.

After every gate the running request's activation matrix is compared with those of all finished
ones, and the nearest one's activation ratios, damped by how far ahead a layer lies, rank what is
prefetched. Prediction is on the critical path (section 6.1 of the FineMoE paper).

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
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import validate_call

from baselines.activation_matrices import MatrixCollection, RunningRequest, Variant
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

UNSEEN_RATIO = 1e-8  # what the code adds to every ratio before the decay (expert_predictor.py)
SMALLEST_ACTIVITY = 1e-6
"""Added to an activation ratio, so that layers tell even unused experts apart."""
Prefetching = Literal["asynchronous", "awaited", "awaited_next_layer", "awaited_at_distance"]


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
        self._early, self._variant, self._eviction = early_layers, variant, eviction
        self._online_growth = online_growth
        few = {"awaited_next_layer": 1, "awaited_at_distance": early_layers}
        distance = few.get(prefetching)
        self.placement = Placement(
            "critical_path",
            awaited=prefetching != "asynchronous",
            awaits=(distance, shape.top_k) if distance else None,
        )
        self.history = self.collection = MatrixCollection(
            shape, capacity, "similar" if variant == "paper" else "unmatched"
        )
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
                self._running[number] = RunningRequest(self.collection, self._variant)
        return [self._running[number] for number in iteration.requests]

    def _popular_experts(self) -> Priorities:
        wanted = np.zeros((self.shape.layers, self.shape.experts))
        early = self.collection.popularity[: self._early]
        popular = (-early).argsort(axis=1, kind="stable")[:, : self.shape.top_k]
        shares = early / np.maximum(early.sum(axis=1, keepdims=True), 1)
        decay = 1 - np.arange(1, len(early) + 1)[:, None] / self._steps
        kept = np.take_along_axis(shares, popular, axis=1) * decay
        np.put_along_axis(wanted[: len(early)], popular, kept, axis=1)
        return wanted

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
        best = (-gates.probabilities).argsort(axis=2, kind="stable")[:, :, : self.shape.top_k]
        flat = best + np.arange(0, layers * experts, experts)[:, None, None]
        counted = [
            np.bincount(flat[:, rows].ravel(), minlength=layers * experts)
            for rows in iteration.rows()
        ]
        return np.stack(counted).reshape(-1, layers, experts).astype(np.float32)

    def _wanted_by(self, nearest: Sequence[NDArray[np.intp]], layers: slice) -> Priorities:
        """Return what each gate requests, (layers, L, J): the largest of the nearest's ratios."""
        first, *others = nearest
        ratios = self.collection.ratios(first)
        for entries in others:
            np.maximum(ratios, self.collection.ratios(entries), out=ratios)
        wanted = ratios.astype(np.float64)
        if self._variant == "code":
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
