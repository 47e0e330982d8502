"""What a system is to the engine: a policy that is told what happened and answers with data.

A policy has no thread, no clock and no device. Whether its predictions run on the critical path or
in the background is declared in `Placement` and carried out by the runtime. Layers and experts
count from 0; arrays are NumPy, float32, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Phase = Literal["prefill", "decode"]


class ExpertId(NamedTuple):
    """One routed expert of the model."""

    layer: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody calls


@dataclass(frozen=True)
class ModelShape:
    """Routing shape of a model: L layers, J experts each, K per token, hidden size h."""

    layers: int
    experts: int
    top_k: int
    hidden_size: int

    @property
    def size(self) -> int:
        """How many routed experts there are, L * J."""
        return self.layers * self.experts

    def place(self, expert: ExpertId) -> int:
        """Return an expert's place among all, l * J + j, which is its place in flat arrays."""
        return expert[0] * self.experts + expert[1]

    def all_experts(self) -> list[ExpertId]:
        """Return all experts in the order of their places."""
        return [ExpertId(x, j) for x in range(self.layers) for j in range(self.experts)]


@dataclass(frozen=True)
class Iteration:
    """One forward pass. Row r of its arrays is a token; requests own consecutive rows."""

    number: int
    phase: Phase
    requests: tuple[int, ...]
    tokens: tuple[int, ...]

    def rows(self) -> list[slice]:
        """Return the rows of each request, in the order of `requests`."""
        stops = np.cumsum(self.tokens).tolist()
        return [slice(stop - n, stop) for stop, n in zip(stops, self.tokens, strict=True)]


class Gate(NamedTuple):
    """What the gate of one layer decided in one iteration (T tokens)."""

    layer: int
    probabilities: FloatArray
    """Full softmax over the layer's experts, shape (T, J)."""
    activated: tuple[int, ...]
    """Indices of the experts that at least one token goes to, ascending."""
    hidden_states: FloatArray | None
    """Input of the MoE block, shape (T, h), if `Placement.hidden_states` asks for it."""


class Gates(NamedTuple):
    """What all gates of one iteration decide, layer by layer: see `Gate`."""

    probabilities: FloatArray
    """Shape (L, T, J)."""
    activated: Sequence[tuple[int, ...]]
    hidden_states: FloatArray | None
    """Shape (L, T, h), if `Placement.hidden_states` asks for it."""


class Prefetch(NamedTuple):
    """A wish to have `expert` on its device before its layer runs; higher priority first."""

    expert: ExpertId
    priority: float


@dataclass(frozen=True)
class PrefetchTable:
    """Wishes for many experts at once: the same as `Prefetch` for each of them, but quicker."""

    priorities: NDArray[np.float64]
    """Shape (L, J), float64; 0 for experts that are not wished for, and more for the others."""

    def __iter__(self) -> Iterator[Prefetch]:
        for layer, index in np.argwhere(self.priorities > 0).tolist():
            yield Prefetch(ExpertId(layer, index), float(self.priorities[layer, index]))


Wishes = Sequence[Prefetch] | PrefetchTable


class LayerOutcome(NamedTuple):
    """How one layer of one iteration found its activated experts (indices, ascending).

    A hit was resident when the gate asked, a late one queued or on its way, a miss not requested.
    """

    iteration: Iteration
    layer: int
    hits: tuple[int, ...]
    late: tuple[int, ...]
    misses: tuple[int, ...]

    @property
    def activated(self) -> tuple[int, ...]:
        return tuple(sorted((*self.hits, *self.late, *self.misses)))


@dataclass(frozen=True)
class Placement:
    """Where a policy's work runs, and what it needs to see."""

    prediction: Literal["none", "background", "critical_path"] = "none"
    hidden_states: bool = False
    """Whether `Gate.hidden_states` is filled; it costs a copy to the host at every layer."""
    everything_resident: bool = False
    """Whether the system keeps all experts on the device, whatever the budget."""
    awaited: bool = False
    """Whether a layer ends only when the prefetches asked for have arrived, or cannot."""
    learns: bool = True
    """Whether history prompts leave anything in it."""
    foresight: bool = False
    """Whether this is a bound that is told the whole routing beforehand, by `Policy.foretell`."""


@dataclass(frozen=True)
class GateWeights:
    """The linear gates of a model, on the host: what speculation by a later gate needs."""

    weight: FloatArray
    """Shape (L, J, h)."""
    bias: FloatArray | None = None
    """Shape (L, J)."""

    def logits(self, layer: int, hidden_states: FloatArray) -> FloatArray:
        """Return what the gate of `layer` makes of hidden states (T, h), shape (T, J)."""
        logits: FloatArray = hidden_states @ self.weight[layer].T
        return logits if self.bias is None else logits + self.bias[layer]


Routing = Sequence[Sequence[tuple[int, ...]]]
"""Activated experts, ascending, of every layer of every iteration, by iteration number."""


class Policy:
    """No prefetch, and an eviction order that a subclass must give.

    Unless the placement says that it predicts nothing, the runtime calls `on_embeddings`,
    `on_gate`, `end_iteration` and `end_request` in the order of events, from one thread (the
    background worker's, if the placement says so). `on_outcome`, `on_load`, `on_evict`,
    `eviction_keys` and `eviction_floor` are called from the engine, one at a time, possibly while
    a prediction runs, and may see it half taken over. What they share with predictions has to bear
    that; what is theirs alone needs no lock.
    """

    placement = Placement()

    def begin_serving(self) -> None:
        """Note that the prompts that prepare a system are over and the cache starts cold."""

    def save(self, path: Path, model_id: str) -> None:
        """Write the policy's history, marked with its model; NotImplementedError without one."""
        raise NotImplementedError

    def load(self, path: Path, model_id: str) -> None:
        """Add a saved history to the policy's own; NotImplementedError without one."""
        raise NotImplementedError

    def study(
        self, iteration: Iteration, embeddings: FloatArray, gates: Callable[[], Iterable[Gate]]
    ) -> None:
        """Learn from an iteration of the history that nobody waits for, as if it were served."""
        self.on_embeddings(iteration, embeddings)
        for gate in gates():
            self.on_gate(iteration, gate)
        self.end_iteration(iteration)

    def set_gates(self, gates: GateWeights) -> None:
        """Take the model's gates, before anything is served; only if `Placement.hidden_states`."""

    def foretell(self, routing: Routing) -> None:
        """Take what serving will activate, after `begin_serving`; only if `Placement.foresight`."""

    def memory_bytes(self) -> dict[str, int]:
        """Return the host memory that the policy's history takes, by what it holds."""
        return {}

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Wishes:
        """Answer the token embeddings (T, h) of an iteration before its first layer runs."""
        return ()

    def compute_ahead(self, iteration: Iteration, gates: Gates) -> None:
        """Take the gates to come, to compute what follows from them for all layers at once.

        Only a replay can tell them, right after `on_embeddings`; no answer may depend on it.
        """

    def on_gate(self, iteration: Iteration, gate: Gate) -> Wishes:
        """Answer the gate of one layer, after its on-demand loads were requested."""
        return ()

    def end_iteration(self, iteration: Iteration) -> Wishes:
        """Close an iteration; the answer is for the next one."""
        return ()

    def end_request(self, request: int) -> None:
        """Forget what was kept for a request."""

    def on_outcome(self, outcome: LayerOutcome) -> None:
        """Take note of which experts a layer used."""

    def on_load(self, expert: ExpertId) -> None:
        """Take note that an expert became resident."""

    def on_evict(self, expert: ExpertId) -> None:
        """Take note that a resident expert lost its slot."""

    def eviction_keys(self, incoming: ExpertId) -> NDArray[np.float64]:
        """Return keys (L, J): among the evictable residents of the device, the largest goes.

        The array may be the policy's own: the engine only reads it, and only at once.
        """
        raise NotImplementedError

    def eviction_floor(self, incoming: ExpertId) -> float:
        """Return the key that a resident must exceed to be evicted for a prefetch of `incoming`.

        An on-demand load takes whoever has the largest key. So a key of -inf keeps an expert from
        being evicted for a prefetch.
        """
        return -math.inf
