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

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from baselines.activation_matrices import MatrixCollection, RunningRequest, Variant
from finemoe.offload.eviction import UsageTable
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    Iteration,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
    PrefetchTable,
    Wishes,
)
from finemoe.options import CHECKED, Count, Flag

UNSEEN_RATIO = 1e-8
"""What the code adds to every ratio before the decay (expert_predictor.py)."""
SMALLEST_ACTIVITY = 1e-6
"""What the code adds to every factor of the cache priority (expert_priority_score.py)."""
PROTECTED = 1e9
"""Above the magnitude of any other eviction key: what is to be prefetched leaves after all else."""

FloatTable = NDArray[np.float64]


@dataclass(frozen=True, config=CHECKED)
class MoEInfinityOptions:
    """What the originals fix, and where they differ. Raises ValueError for a wrong value."""

    early_layers: Count
    """Layers whose popular experts are prefetched before layer 0; as many as FineMoE's d."""
    capacity: Count = 1000
    """Matrices in the collection (`trace_capacity` in moe_infinity/utils/config.py)."""
    variant: Variant = "paper"
    eviction: Literal["activation", "lfu", "lru"] = "activation"
    """Activation ratio x layer decay (expert_priority_score.py), or plain counts or recency."""
    horizon: Count | None = None
    """Layers ahead that are asked for; None: all that are left, as the originals do."""
    online_growth: Flag = True
    """Whether requests enter the collection while serving (`finish_entry`, expert_tracer.py)."""


class _Answer(NamedTuple):
    """What follows from the gate of one layer."""

    wishes: PrefetchTable | None
    plain: FloatTable
    """Eviction keys of the layer's experts but for wishes, shape (J,)."""


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
        layers = np.arange(shape.layers)
        ahead = (layers - layers[:, None])[:, :, None]
        self._steps = shape.layers if options.variant == "paper" else shape.layers + 1
        within = (ahead > 0) & (ahead <= (options.horizon or shape.layers))
        self._decay = np.where(within, 1 - ahead / self._steps, 0)
        """How much a prediction counts, by the layer that it is made at and the one it is for."""
        self._front = 1 - layers[:, None] / shape.layers
        """Cache priority of a layer: the front ones have least time to be prefetched."""
        uniform = np.full((shape.layers, shape.experts), 1 / shape.experts)
        self._unseen = -(uniform + SMALLEST_ACTIVITY) * self._front
        self._popular = (-1, PrefetchTable(np.zeros((shape.layers, shape.experts))))
        self.begin_cache()

    def begin_cache(self) -> None:
        """Forget what the cache saw."""
        self._usage = UsageTable(self.shape)
        self._served: tuple[int, ...] = ()
        self._plain = self._unseen.copy()
        self._keys = self._unseen.copy()
        self._now = -1
        self._wanted: PrefetchTable | None = None
        """What is asked for and `_keys` do not show yet."""
        self._ahead: list[_Answer] = []

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

    def study(
        self, iteration: Iteration, embeddings: FloatArray, gates: Callable[[], Iterable[Gate]]
    ) -> None:
        """Count the iteration's tokens; wishes and keys would leave no trace."""
        given = list(gates())
        probabilities = np.stack([gate.probabilities for gate in given])
        for request in self._requests(iteration):
            request.begin_iteration()
        stacked = Gates(probabilities, [gate.activated for gate in given], None)
        self._count(iteration, slice(0, self.shape.layers), stacked)

    # Predictions ------------------------------------------------------------------------------

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Wishes:
        """Ask for the K most popular experts of the early layers, which no gate foretells."""
        requests = self._requests(iteration)
        for request in requests:
            request.begin_iteration()
        if iteration.requests != self._served:
            self._served = iteration.requests
            tokens = _tokens_of(requests, slice(0, self.shape.layers))
            seen = tokens.any(axis=1, keepdims=True)
            self._plain = np.where(seen, self._activity_keys(tokens), self._unseen)
        if self._popular[0] != self.collection.additions:
            self._popular = (self.collection.additions, PrefetchTable(self._popular_experts()))
        self._now, self._wanted = -1, self._popular[1]
        self._ahead = []
        return self._popular[1]

    def compute_ahead(self, iteration: Iteration, gates: Gates) -> None:
        self._ahead = self._answers(iteration, slice(0, self.shape.layers), gates)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Wishes:
        if self._ahead:
            answer = self._ahead[gate.layer]
        else:
            one = Gates(gate.probabilities[None], [gate.activated], None)
            (answer,) = self._answers(iteration, slice(gate.layer, gate.layer + 1), one)
        self._plain[gate.layer] = answer.plain
        if answer.wishes is None:
            self._keys[gate.layer] = answer.plain
            return ()
        self._wanted = answer.wishes
        return answer.wishes

    def end_request(self, request: int) -> None:
        """Store what the request activated, and compare the others with it."""
        finished = self._running.pop(request, None)
        if finished is None or not self._growing:
            return
        entry = self.collection.add(finished.matrix, self._replace)
        if entry is not None:
            for other in self._running.values():
                other.refresh(entry)

    def _requests(self, iteration: Iteration) -> list[RunningRequest]:
        for number in iteration.requests:
            if number not in self._running:
                self._running[number] = RunningRequest(self.collection, self.options.variant)
        return [self._running[number] for number in iteration.requests]

    def _popular_experts(self) -> FloatTable:
        """Return wishes for the early layers' K most popular experts, shape (L, J)."""
        wanted = np.zeros((self.shape.layers, self.shape.experts))
        early = self.collection.popularity[: self.options.early_layers]
        popular = (-early).argsort(axis=1, kind="stable")[:, : self.shape.top_k]
        shares = early / np.maximum(early.sum(axis=1, keepdims=True), 1)
        decay = 1 - np.arange(1, len(early) + 1)[:, None] / self._steps
        kept = np.take_along_axis(shares, popular, axis=1) * decay
        np.put_along_axis(wanted[: len(early)], popular, kept, axis=1)
        return wanted

    def _answers(self, iteration: Iteration, layers: slice, gates: Gates) -> list[_Answer]:
        """Return what follows from the gates of consecutive layers, one after the other."""
        nearest = self._count(iteration, layers, gates)
        rows = self._activity_keys(_tokens_of(self._requests(iteration), layers), layers.start)
        wishes: list[PrefetchTable | None] = [None] * len(rows)
        if nearest:
            wanted = self._tables(nearest, layers)[: self.shape.layers - 1 - layers.start]
            wishes[: len(wanted)] = [PrefetchTable(table) for table in wanted]
        return [_Answer(*answer) for answer in zip(wishes, rows, strict=True)]

    def _count(self, iteration: Iteration, layers: slice, gates: Gates) -> list[NDArray[np.intp]]:
        """Take note of the gates' tokens; return each request's nearest entry after each gate.

        Nothing is near while nothing is stored.
        """
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
        places = best + np.arange(0, layers * experts, experts)[:, None, None]
        counted = [
            np.bincount(places[:, rows].ravel(), minlength=layers * experts)
            for rows in iteration.rows()
        ]
        return np.stack(counted).reshape(-1, layers, experts).astype(np.float32)

    def _tables(self, nearest: Sequence[NDArray[np.intp]], layers: slice) -> FloatTable:
        """Return what each gate wishes for, (layers, L, J): the ratios of the nearest matrices.

        Of several requests the largest counts.
        """
        first, *others = nearest
        ratios = self.collection.ratios(first)
        for entries in others:
            np.maximum(ratios, self.collection.ratios(entries), out=ratios)
        wanted = ratios.astype(np.float64)
        if self.options.variant == "code":
            wanted += UNSEEN_RATIO
        wanted *= self._decay[layers]
        return wanted

    # Cache ------------------------------------------------------------------------------------

    def _activity_keys(self, tokens: FloatArray, first: int = 0) -> FloatTable:
        """Return eviction keys of layers `first` on, from all requests' tokens (layers, J).

        The smallest activation ratio x (1 - l / L) leaves, from expert_priority_score.py.
        """
        shares = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
        activity = shares.astype(np.float64) + SMALLEST_ACTIVITY
        return -activity * self._front[first : first + len(tokens)]

    def on_outcome(self, outcome: LayerOutcome) -> None:
        """Protect no longer what was to be prefetched until now."""
        if self.options.eviction != "activation":
            self._usage.on_outcome(outcome)
        self._now = outcome.layer
        self._keys[: self._now + 1] = self._plain[: self._now + 1]

    def on_load(self, expert: ExpertId) -> None:
        if self.options.eviction != "activation":
            self._usage.on_load(expert)

    def eviction_keys(self, incoming: ExpertId) -> FloatTable:
        """Evict the least active, or by the order that was chosen; last what is to be prefetched.

        Of the latter the least wanted leaves first.
        """
        self._protect()
        if self.options.eviction == "activation":
            return self._keys
        lru = self.options.eviction == "lru"
        keys = self._usage.lru_keys() if lru else self._usage.lfu_keys()
        return np.where(self._keys <= -PROTECTED, self._keys, keys)

    def eviction_floor(self, incoming: ExpertId) -> float:
        """Keep from a prefetch what is wanted as much or more.

        The code does not evict its cache candidates (core/prefetch/task_scheduler.cpp).
        """
        self._protect()
        key = self._keys.item(incoming)
        return key if key < -PROTECTED else -PROTECTED

    def _protect(self) -> None:
        """Have the keys of what was asked for last, and did not run yet, show that."""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        later = self._now + 1
        protected = -PROTECTED - wanted.priorities[later:]
        self._keys[:] = self._plain
        np.copyto(self._keys[later:], protected, where=wanted.priorities[later:] > 0)


def _tokens_of(requests: Sequence[RunningRequest], layers: slice) -> FloatArray:
    """Return the tokens of all requests per expert, shape (layers, J)."""
    first, *others = (request.matrix[layers] for request in requests)
    return sum(others, start=first)


def moe_infinity(shape: ModelShape, **options: int | str | bool | None) -> MoEInfinityPolicy:
    """Return the policy for `MoEInfinityOptions` given one by one, as its YAML does."""
    return MoEInfinityPolicy(shape, MoEInfinityOptions(**options))  # type: ignore[arg-type]
