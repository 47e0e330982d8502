"""FineMoE: prefetch what the most similar remembered iteration activated (sections 4.2 to 4.5)."""

from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from finemoe.expert_map import ExpertMapStore, Matches, TrajectorySearch, nearest
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
    Priorities,
    Table,
    layer_requests,
)
from finemoe.options import CHECKED, Count, Flag
from finemoe.selection import Variant, divisors, select_experts, union_priorities

SMALLEST_PROBABILITY = 1e-9  # of an expert, as its eviction key takes it


@dataclass(frozen=True, config=CHECKED)
class FineMoEOptions:
    """What the paper fixes and its ablations vary; docs/fidelity.md says what speaks for which."""

    prefetch_distance: Count  # d; 3 for Mixtral, 6 for Qwen, 4 for Phi (section 6.1)
    store_capacity: Count = 1000  # C (section 6.1)
    variant: Variant = "paper"  # whose selection and priorities: see finemoe/selection.py
    search: Literal["both", "semantic", "trajectory"] = "both"  # figure 14a: T+S, S or T alone
    selection: Literal["delta", "top_k"] = "delta"  # similarity-aware (4.3) or always K experts
    eviction: Literal["finemoe", "demo", "lru", "lfu"] = "finemoe"  # figure 14b, and the demo's
    horizon: Literal["single", "all", "demo"] = "single"
    """After the gate of layer l, predict layer l + d, all from there on, or all but that one."""
    aggregation: Literal["mean", "token", "demo"] = "token"
    """What queries and enters the store of a prompt: the mean over its tokens, or every token; the
    demo remembers every token and searches by each request's last one."""
    online_growth: Flag = True
    """Whether iterations enter the store while serving, beyond the prompts that prepared it."""
    asynchronous: Flag = True  # search in the background (section 4.3) or on the critical path


class ExpectedUse:
    """Eviction keys 1 / (p * freq): p from the maps searched last, freq counts visits (4.5).

    An expert not yet visited counts as visited once. `expect` may be called from another thread
    than the others: it writes p alone, and tells by `_revised` from which layers on.
    """

    def __init__(self, shape: ModelShape) -> None:
        table = (shape.layers, shape.experts)
        self._layers = shape.layers
        self._anything = np.float32(1 / shape.experts)
        self._expected = np.full(table, self._anything, dtype=np.float64)
        self._visits = [[0] * shape.experts for _ in range(shape.layers)]
        self._frequency = np.ones(table)
        self._keys = np.empty(table)
        self._revised = [0]

    def expect(self, probabilities: FloatArray, first: int) -> None:
        """Take p of the layers from `first` on, shape (L - first, J)."""
        np.maximum(probabilities, SMALLEST_PROBABILITY, out=self._expected[first:])
        self._revised.append(first)

    def expect_anything(self) -> None:
        """Take every expert of a layer to be as likely as any."""
        self._expected[:] = self._anything
        self._revised.append(0)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        layer = outcome.layer
        visits, frequency = self._visits[layer], self._frequency[layer]
        expected, keys = self._expected[layer], self._keys[layer]
        # One by one: for the few experts of a decode step this beats indexing with a list.
        for index in outcome.activated:
            visits[index] += 1
            frequency[index] = visits[index]
            keys[index] = 1 / (expected[index] * frequency[index])

    def keys(self) -> Table:
        """Return the keys in an array that is updated in place."""
        first = self._layers
        while self._revised:
            first = min(first, self._revised.pop())
        if first < self._layers:
            keys = self._keys[first:]
            np.multiply(self._expected[first:], self._frequency[first:], out=keys)
            np.reciprocal(keys, out=keys)
        return self._keys


class WholeUse(ExpectedUse):
    """The demo's keys: p * freq as an integer; the least goes, of equal ones the first."""

    def forget(self, expert: ExpertId) -> None:
        self._visits[expert.layer][expert.index] = 0
        self._frequency[expert] = 1

    def keys(self) -> Table:
        return -np.floor(self._expected * self._frequency)


class FineMoEPolicy(UsageTable):
    """Searches the store after the embeddings and after every gate, and prefetches its answer.

    Q counts what an iteration enters into the store: its requests, or its tokens.
    """

    def __init__(self, shape: ModelShape, options: FineMoEOptions) -> None:
        self.shape = shape
        self.options = options
        self.placement = Placement(
            "background" if options.asynchronous else "critical_path",
            by_token=options.aggregation != "mean",
            replaces=options.aggregation == "demo",
        )
        self.distance = min(options.prefetch_distance, shape.layers)
        self._ahead_of_gate = self.distance + (options.horizon == "demo")
        self.history = self.store = ExpertMapStore(shape, options.store_capacity, self.distance)
        self._growing = True
        self._by_maps = options.eviction in ("finemoe", "demo")
        self.forget()
        self._begin(np.empty((0, shape.hidden_size), dtype=np.float32))

    def _begin(self, embeddings: FloatArray) -> None:
        """Forget the last iteration, after which the store may have changed; embeddings (Q, h)."""
        shape = (self.shape.layers, len(embeddings), self.shape.experts)
        self._embeddings = embeddings
        self._rows: FloatArray = np.empty(shape, dtype=np.float32)
        self._cosines: FloatArray | None = None
        self._semantic: Matches | None = None
        self._trajectory: TrajectorySearch | None = None
        self._ahead: list[tuple[set[int], Priorities | None]] = []
        self._followed: set[int] = set()

    def begin_serving(self) -> None:
        self._growing = self.options.online_growth
        super().begin_serving()

    def learn(self, iteration: Iteration, embeddings: FloatArray, gates: Gates) -> None:
        self._begin(self._queries(iteration, embeddings))
        self._rows = self._queries(iteration, gates.probabilities)
        self.end_iteration(iteration)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities | None:
        self._begin(self._queries(iteration, embeddings))
        if not self.store.size:
            return None
        if self.options.search != "semantic":
            batch = len(self._searching(iteration, self._embeddings))
            self._trajectory = TrajectorySearch(self.store, batch)
        if self.options.search == "trajectory":
            self._use.expect_anything()
            return None
        self._cosines = self.store.cosines(self._embeddings)
        self._semantic = nearest(self._searching(iteration, self._cosines)[None])
        self._expect(set(self._semantic.entries[0].tolist()), 0)
        return self._band(self._semantic, range(self.distance), now=-1)

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        self._rows = self._queries(iteration, gates.probabilities)
        self._ahead = self._answers(iteration, 0, self._rows)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        layer = gate.layer
        if self._ahead:
            entries, requests = self._ahead[layer]
        else:
            self._rows[layer] = self._queries(iteration, gate.probabilities)
            rows = self._rows[layer : layer + 1]
            ((entries, requests),) = self._answers(iteration, layer, rows)
        self._expect(entries, layer + self._ahead_of_gate)
        return requests

    def end_iteration(self, iteration: Iteration) -> None:
        if self._growing:
            dots = None if self._trajectory is None else self._trajectory.dots
            if dots is not None and len(dots) < len(self._embeddings):
                dots = None
            of_prompt = iteration.phase == "prefill"
            self.store.add_all(self._rows, self._embeddings, self._cosines, dots, of_prompt)

    def _queries(self, iteration: Iteration, rows: FloatArray) -> FloatArray:
        """Return one row a query, (..., T, n) to (..., Q, n): a request's mean, or every token."""
        if self.options.aggregation != "mean" or rows.shape[-2] == len(iteration.requests):
            return rows
        return np.stack([rows[..., r, :].mean(axis=-2) for r in iteration.rows()], axis=-2)

    def _searching(self, iteration: Iteration, rows: FloatArray) -> FloatArray:
        """Return those of the rows (..., Q, n) that search."""
        if self.options.aggregation != "demo":
            return rows
        return rows[..., [r.stop - 1 for r in iteration.rows()], :]

    def _answers(
        self, iteration: Iteration, first: int, rows: FloatArray
    ) -> list[tuple[set[int], Priorities | None]]:
        """Return what gates from layer `first` on, rows (N, Q, J), match, and what they ask for."""
        if self._trajectory is not None:
            matches = self._trajectory.observe(self._searching(iteration, rows))
        elif self._semantic is not None:
            matches = self._semantic.after([0] * len(rows))
        else:
            return [(set(), None)] * len(rows)
        followed = map(set, matches.entries.tolist())
        return list(zip(followed, self._requests(matches, first), strict=True))

    def _requests(self, matches: Matches, first: int) -> list[Priorities | None]:
        """Return what each gate from layer `first` on asks for, all at once if that can be."""
        layers, target, gates = self.shape.layers, first + self._ahead_of_gate, len(matches.entries)
        if self.options.horizon != "single":
            return [
                self._band(matches.after([n]), range(target + n, layers), now=first + n)
                for n in range(gates)
            ]
        requests: list[Priorities | None] = [None] * gates
        wanted = matches.after(slice(max(layers - target, 0)))
        if len(wanted.entries):
            rows = self._select(wanted, range(target, target + 1), now=first)
            requests[: len(rows)] = layer_requests(self.shape, target, rows)
        return requests

    def _band(self, matches: Matches, band: range, now: int) -> Priorities | None:
        """Return what the same matches (1, B) ask for of a band of layers."""
        if not band:
            return None
        requests = np.zeros((self.shape.layers, self.shape.experts))
        requests[band.start : band.stop] = self._select(matches, band, now)
        return requests

    def _select(self, matches: Matches, band: range, now: int) -> Priorities:
        """Return priorities (N, J) of N layers from the band's first on, by matches (N, B).

        All layers of a band may share theirs, (1, B); a band of one gives N layers its distance.
        """
        options, first = self.options, band.start
        layers = np.arange(first, first + max(len(band), len(matches.entries)))[:, None]
        probabilities = self.store.maps[layers, :, matches.entries]
        scores = np.broadcast_to(matches.scores, probabilities.shape[:2])
        trusted = scores.ravel() if options.selection == "delta" else np.ones(scores.size)
        flat = probabilities.reshape(-1, self.shape.experts)
        chosen = select_experts(flat, trusted, self.shape.top_k, options.variant)
        by = divisors(band, now, options.variant)
        return union_priorities(
            probabilities, chosen.reshape(probabilities.shape), by, options.variant
        )

    def forget(self) -> None:
        super().forget()
        self._use = (WholeUse if self.options.eviction == "demo" else ExpectedUse)(self.shape)

    def _expect(self, entries: set[int], first: int) -> None:
        """Have evictions go by stored maps from layer `first` on; of several by their maximum."""
        if first >= self.shape.layers or entries == self._followed:
            return
        self._followed = entries
        maps = [self.store.expert_map(entry)[first:] for entry in entries]
        self._use.expect(maps[0] if len(maps) == 1 else np.maximum.reduce(maps), first)

    def on_outcome(self, outcome: LayerOutcome) -> None:
        if self._by_maps:
            self._use.on_outcome(outcome)
        else:
            super().on_outcome(outcome)

    def on_load(self, expert: ExpertId) -> None:
        if not self._by_maps:
            super().on_load(expert)

    def on_evict(self, expert: ExpertId) -> None:
        if isinstance(self._use, WholeUse):
            self._use.forget(expert)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        if self._by_maps:
            return self._use.keys()
        lru = self.options.eviction == "lru"
        return self._recency if lru else super().eviction_keys(incoming, urgent)


def finemoe(shape: ModelShape, **options: Any) -> FineMoEPolicy:
    """Return the policy for `FineMoEOptions` given one by one; ValueError for a wrong value."""
    return FineMoEPolicy(shape, FineMoEOptions(**options))
