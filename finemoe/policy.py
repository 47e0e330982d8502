"""FineMoE: prefetch what the most similar remembered iteration activated (sections 4.2 to 4.5).

Where the paper and the authors' demo repository differ, `variant` chooses: `paper`, or `demo`,
which selects one expert fewer, decays priorities linearly over the predicted layers, and queues all
other experts of those layers at the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from finemoe.expert_map import ExpertMapStore
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
    Prefetch,
)
from finemoe.search import Match, TrajectorySearch, semantic_search

Variant = Literal["paper", "demo"]

TAIL_PRIORITY = 1e-6
SMALLEST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class FineMoEOptions:
    """What the paper fixes and its ablations vary."""

    prefetch_distance: int
    """d; 3 for Mixtral, 6 for Qwen, 4 for Phi (section 6.1)."""
    store_capacity: int = 1000
    """C (section 6.1)."""
    variant: Variant = "paper"
    search: Literal["both", "semantic", "trajectory"] = "both"
    """Figure 14a: T+S, S alone for every layer, or T alone."""
    selection: Literal["delta", "top_k"] = "delta"
    """Similarity-aware (section 4.3) or always K experts."""
    eviction: Literal["finemoe", "lru", "lfu"] = "finemoe"
    """Figure 14b."""
    horizon: Literal["single", "all"] = "single"
    """After the gate of layer l, predict layer l + d (paper) or all layers from there (demo)."""
    aggregation: Literal["mean", "token"] = "mean"
    """A request's iteration is one query, the mean over its tokens, or one query a token (demo)."""
    online_growth: bool = True
    """Whether iterations enter the store while serving, beyond the prompts that prepared it."""
    asynchronous: bool = True
    """Search in the background (section 4.3) or on the critical path."""


def select_experts(
    probabilities: FloatArray, score: float, top_k: int, variant: Variant = "paper"
) -> NDArray[np.intp]:
    """Return experts by descending p until their sum reaches delta = clip(1 - score, 0, 1).

    Never fewer than `top_k`. The demo stops one short of reaching delta.
    """
    delta = min(max(1.0 - score, 0.0), 1.0)
    order = (-probabilities).argsort(kind="stable")
    if float(probabilities[order[0]]) >= delta:
        return order[:top_k]
    # A running sum in double precision, one addend after the other.
    sums = probabilities[order].cumsum(dtype=np.float64)
    if variant == "paper":
        count = 1 + int(sums.searchsorted(delta, "left"))
    else:
        count = int(sums.searchsorted(delta, "right"))
    return order[: max(count, top_k)]


class FineMoEPolicy(Policy):
    """Searches the store after the embeddings and after every gate, and prefetches its answer."""

    def __init__(self, shape: ModelShape, options: FineMoEOptions) -> None:
        self.shape = shape
        self.options = options
        self.placement = Placement("background" if options.asynchronous else "critical_path")
        self.distance = min(options.prefetch_distance, shape.layers)
        self.store = ExpertMapStore(shape, options.store_capacity, self.distance)
        self._growing = True
        self._usage = UsageTable(shape)
        self._expected: FloatArray = np.full(
            (shape.layers, shape.experts), 1 / shape.experts, dtype=np.float32
        )
        self._embeddings: FloatArray = np.empty((0, shape.hidden_size), dtype=np.float32)
        self._observed: list[FloatArray] = []
        self._semantic: list[Match] = []
        self._trajectory: TrajectorySearch | None = None

    def begin_serving(self) -> None:
        self._growing = self.options.online_growth
        self._usage = UsageTable(self.shape)
        self._expect_anything()

    def save(self, path: Path, model_id: str) -> None:
        self.store.save(path, model_id)

    def load(self, path: Path, model_id: str) -> None:
        self.store.load(path, model_id)

    def memory_bytes(self) -> dict[str, int]:
        return {"maps": self.store.map_bytes, "store": self.store.total_bytes}

    def study(
        self, iteration: Iteration, embeddings: FloatArray, gates: Callable[[], Iterable[Gate]]
    ) -> None:
        """Remember the iteration; searches would leave no trace."""
        self._embeddings = self._queries(iteration, embeddings)
        self._observed = [self._queries(iteration, gate.probabilities) for gate in gates()]
        self.end_iteration(iteration)

    # Predictions ------------------------------------------------------------------------------

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Sequence[Prefetch]:
        self._embeddings = self._queries(iteration, embeddings)
        self._observed = []
        if not self.store.size:
            return ()
        self._trajectory = TrajectorySearch(self.store, len(self._embeddings))
        if self.options.search == "trajectory":
            self._expect_anything()
            return ()
        self._semantic = semantic_search(self.store, self._embeddings)
        self._expect(self._semantic, range(self.shape.layers))
        return self._prefetches(self._semantic, range(self.distance), now=-1)

    def compute_ahead(self, iteration: Iteration, gates: Gates) -> None:
        if self._trajectory is not None and self.options.search != "semantic":
            rows = [self._queries(iteration, layer) for layer in gates.probabilities]
            self._trajectory.compute_ahead(np.stack(rows))

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        rows = self._queries(iteration, gate.probabilities)
        self._observed.append(rows)
        if self._trajectory is None:
            return ()
        by_embedding = self.options.search == "semantic"
        matches = self._semantic if by_embedding else self._trajectory.observe(rows)
        first = gate.layer + self.distance
        last = self.shape.layers if self.options.horizon == "all" else first + 1
        targets = range(first, min(last, self.shape.layers))
        self._expect(matches, range(first, self.shape.layers))
        return self._prefetches(matches, targets, now=gate.layer)

    def end_iteration(self, iteration: Iteration) -> Sequence[Prefetch]:
        if self._growing:
            maps = np.stack(self._observed, axis=1)
            for expert_map, embedding in zip(maps, self._embeddings, strict=True):
                self.store.add(expert_map, embedding)
        self._trajectory = None
        return ()

    def _queries(self, iteration: Iteration, rows: FloatArray) -> FloatArray:
        """Return one row a query: the mean of a request's tokens, or every token."""
        if self.options.aggregation == "token" or len(rows) == len(iteration.requests):
            return rows
        return np.stack([rows[part].mean(axis=0) for part in iteration.rows()])

    def _expect_anything(self) -> None:
        self._expected[:] = 1 / self.shape.experts

    def _expect(self, matches: Sequence[Match], layers: range) -> None:
        """Note the searched maps' probabilities, the p of the eviction priority.

        The semantic map gives p for all layers until trajectory maps replace it; queries of a
        batch give their maximum.
        """
        if not layers:
            return
        target = self._expected[layers.start :]
        first, *others = (self.store.expert_map(match.entry)[layers.start :] for match in matches)
        target[:] = first
        for searched in others:
            np.maximum(target, searched, out=target)

    def _prefetches(self, matches: Iterable[Match], band: range, now: int) -> list[Prefetch]:
        """Return the union of the queries' prefetches over a band of layers."""
        best: dict[ExpertId, float] = {}
        for match in matches:
            expert_map = self.store.expert_map(match.entry)
            for layer in band:
                chosen = self._select(expert_map[layer], match.score)
                ranked = self._prioritise(expert_map[layer], chosen, layer, band, now)
                for index, priority in ranked:
                    expert = ExpertId(layer, index)
                    best[expert] = max(priority, best.get(expert, 0.0))
        return [Prefetch(expert, priority) for expert, priority in best.items()]

    def _select(self, probabilities: FloatArray, score: float) -> NDArray[np.intp]:
        trusted = 1.0 if self.options.selection == "top_k" else score
        return select_experts(probabilities, trusted, self.shape.top_k, self.options.variant)

    def _prioritise(
        self, probabilities: FloatArray, chosen: NDArray[np.intp], layer: int, band: range, now: int
    ) -> Iterable[tuple[int, float]]:
        """Yield experts with p / (l - l_now) (section 4.5), or with the demo's priorities."""
        if self.options.variant == "paper":
            for index in chosen.tolist():
                yield index, float(probabilities[index]) / (layer - now)
            return
        decay = 1 - (layer - band.start) / band.stop
        weights = np.zeros(self.shape.experts)
        weights[chosen] = probabilities[chosen] * decay
        yield from enumerate((weights + TAIL_PRIORITY).tolist())

    # Cache ------------------------------------------------------------------------------------

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self._usage.on_outcome(outcome)

    def on_load(self, expert: ExpertId) -> None:
        self._usage.on_load(expert)

    def eviction_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        """Return 1 / (p * freq), p from the map searched for this iteration (section 4.5).

        freq counts visits of the cache; an expert prefetched but not yet visited counts as one.
        """
        if self.options.eviction == "lru":
            return self._usage.lru_keys()
        if self.options.eviction == "lfu":
            return self._usage.lfu_keys()
        probabilities = np.maximum(self._expected, SMALLEST_PROBABILITY)
        return 1 / (probabilities * np.maximum(self._usage.visits, 1.0))


def finemoe(shape: ModelShape, **options: Any) -> FineMoEPolicy:
    """Return the policy for `FineMoEOptions` given one by one, as conf/system/finemoe.yaml does.

    Raises ValueError for an option that has no such value.
    """
    hints = get_type_hints(FineMoEOptions)
    for name, value in options.items():
        allowed = get_args(hints[name])
        if allowed and value not in allowed:
            raise ValueError(f"{name}={value} is none of {', '.join(allowed)}")
        if not allowed and type(value) is not hints[name]:
            raise ValueError(f"{name}={value} is no {hints[name].__name__}")
        if hints[name] is int and value < 1:
            raise ValueError(f"{name}={value}: it starts at 1")
    return FineMoEPolicy(shape, FineMoEOptions(**options))
