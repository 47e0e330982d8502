"""What a system is to the engine: a policy that is told what happened and answers with data.

A policy has no thread, no clock and no device. Whether its predictions run on the critical path or
in the background is declared in `Placement` and carried out by the runtime. Layers and experts
count from 0; arrays are NumPy, float32, on the host.
"""

import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Table = NDArray[np.float64]  # a number for every expert, shape (L, J)
Priorities = Table  # prefetch requests: experts above 0 are requested, the highest go first
Phase = Literal["prefill", "decode"]
Routing = Sequence[Sequence[tuple[int, ...]]]
"""Activated experts, ascending, of every layer of every iteration, by iteration number."""


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
        return self.layers * self.experts


SMALLEST_PRIORITY = 1e-300  # of a request for an expert whose probability was rounded to 0


def layer_requests(shape: ModelShape, first: int, rows: Priorities) -> list[Priorities]:
    """Return requests for one layer each, from layer `first` on, by priorities (N, J)."""
    requests = np.zeros((len(rows), shape.layers, shape.experts))
    steps = np.arange(len(rows))
    requests[steps, steps + first] = rows
    return list(requests)


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
    probabilities: FloatArray  # full softmax over the layer's experts, shape (T, J)
    activated: tuple[int, ...]  # indices of the experts that at least one token goes to, ascending
    hidden_states: FloatArray | None
    """Input of the gate, shape (T, h), if `Placement.hidden_states` asks for it."""


class Gates(NamedTuple):
    """What all gates of one iteration decide, layer by layer: see `Gate`."""

    probabilities: FloatArray  # shape (L, T, J)
    activated: Sequence[tuple[int, ...]]
    hidden_states: FloatArray | None  # shape (L, T, h), if `Placement.hidden_states` asks for it

    def of(self, layer: int) -> Gate:
        hidden = None if self.hidden_states is None else self.hidden_states[layer]
        return Gate(layer, self.probabilities[layer], self.activated[layer], hidden)


class LayerOutcome(NamedTuple):
    """How one layer of one iteration found its activated experts (indices, ascending).

    A hit was resident when the gate asked, a late one queued or on its way, a miss not requested.
    What the policy had the host compute is none of them, wherever it was.
    """

    iteration: Iteration
    layer: int
    hits: tuple[int, ...]
    late: tuple[int, ...]
    misses: tuple[int, ...]
    host: tuple[int, ...] = ()

    @property
    def activated(self) -> tuple[int, ...]:
        return tuple(sorted((*self.hits, *self.late, *self.misses, *self.host)))


@dataclass(frozen=True)
class Machine:
    """What loads and computation take on a testbed, in seconds, each alone."""

    slots: tuple[int, ...]  # of each device; flat index n lives on device n mod devices
    load: float  # one expert over its device's link
    host: Callable[[int], float]  # one expert for so many tokens, and moving these there and back
    device: Callable[[int], float]
    share: float = 1.0
    """Of its rate, what each link has while all copy; below 1 if the host's memory is the narrower.
    Only a simulated testbed knows it."""


class Need(NamedTuple):
    """What a gate needs (indices, ascending), of which something is not resident."""

    iteration: Iteration
    layer: int
    tokens: Sequence[int]  # that go to each expert, at least up to the last activated one
    resident: tuple[int, ...]
    missing: tuple[int, ...]  # also what is requested or on its way
    arriving: tuple[int, ...] = ()  # those of which a link copies something now


@dataclass(frozen=True)
class Placement:
    """Where a policy's work runs, and what it needs to see."""

    prediction: Literal["none", "background", "critical_path"] = "none"
    hidden_states: bool = False
    """Whether `Gate.hidden_states` is filled; it costs a copy to the host at every layer."""
    everything_resident: bool = False
    """Whether the system keeps all experts on the device, whatever the budget."""
    awaited: bool = False
    """Whether a layer ends only when the requested prefetches have arrived, or cannot."""
    awaits: tuple[int, int] | None = None
    """How many layers ahead and how many experts: nobody else is awaited than the most wanted ones
    of that layer. None: all that is requested."""
    by_token: bool = True
    """Whether a call of the policy takes longer for each token of the iteration."""
    replaces: bool = False
    """Whether an answer takes back whatever was requested before and did not start."""
    displaces_less: bool = False
    """Whether a prefetch evicts only whose key is larger than its own."""
    wraps: bool = False
    """Whether what the answer to a gate requests for its layer and those before is for the next
    iteration; otherwise nobody can request that before this one ends."""


LEAST_SCORE = 1e-6
"""What gates that rank by other scores than logits give experts below zero and those masked."""


@dataclass(frozen=True)
class GateWeights:
    """The gates of a model, on the host: what speculation by a later gate needs.

    Linear ones, or those of DeepSeek-V3 (arXiv 2412.19437): the sigmoids of their logits and a
    `correction` rank experts, those alone in the `groups[1]` of `groups[0]` groups whose two best
    sum up to most.
    """

    weight: FloatArray  # shape (L, J, h)
    bias: FloatArray | None = None  # shape (L, J)
    correction: FloatArray | None = None  # shape (L, J)
    groups: tuple[int, int] = (1, 1)

    def logits(self, layers: int | slice, hidden_states: FloatArray) -> FloatArray:
        """Return what gates make of hidden states: (T, h) to (T, J), or with S layers in front.

        A softmax of it ranks experts as the gate does.
        """
        logits: FloatArray = hidden_states @ self.weight[layers].swapaxes(-1, -2)
        if self.bias is not None:
            logits = logits + self.bias[layers][..., None, :]
        if self.correction is None:
            return logits
        scores = 1 / (1 + np.exp(-logits)) + self.correction[layers][..., None, :]
        count, kept = self.groups
        grouped = scores.reshape(*scores.shape[:-1], count, scores.shape[-1] // count)
        best = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        last = np.sort(best, axis=-1)[..., -kept, None]
        scores = np.where((best >= last)[..., None], grouped, 0).reshape(scores.shape)
        scores = np.maximum(scores, LEAST_SCORE)
        shares: FloatArray = np.log(scores / scores.sum(axis=-1, keepdims=True))
        return shares


class History(Protocol):
    """What a policy learned, as far as it can be kept in a file."""

    def save(self, path: Path, model_id: str) -> None:
        """Write it, marked with its model."""

    def load(self, path: Path, model_id: str) -> None:
        """Add a saved one; ValueError for a file of another model, or a damaged one."""

    def memory_bytes(self) -> dict[str, int]:
        """Return the host memory it takes, by what it holds."""

    def counts(self) -> dict[str, int]:
        """Return how many entries it holds, and how many of some kind."""


class Policy:
    """No prefetch, and an eviction order that a subclass must give.

    Unless the placement says that it predicts nothing, the runtime calls `on_embeddings`,
    `on_gate`, `end_iteration` and `end_request` in the order of events, from one thread (the
    background worker's, if the placement says so). The first three answer with prefetch requests.
    `on_outcome`, `on_load`, `on_evict` and `eviction_keys` are called from the engine, one at a
    time, possibly while a prediction runs. What they share with predictions has to bear that.
    """

    placement = Placement()

    # What only some policies have.
    history: History | None = None
    learn: Callable[[Iteration, FloatArray, Gates], None] | None = None
    """Take in an iteration of the history (its embeddings are (T, h)); `end_request` follows."""
    set_gates: Callable[[GateWeights], None] | None = None
    """Take the model's gates, before anything is served."""
    set_machine: Callable[[Machine], None] | None = None
    """Take what loads and computation take, before anything is served."""
    host_experts: Callable[[Need], Collection[int]] | None = None
    """Choose from `Need.missing` whom the host computes where it lies; the others are loaded.

    Called from the engine, as `on_outcome` is, before anything is demanded. What of a chosen one
    is on its way is dropped.
    """
    set_future_routing: Callable[[Routing], None] | None = None
    """Take all that serving will activate, after `begin_serving`: for bounds."""
    predict_ahead: Callable[[Iteration, Gates], None] | None = None
    """Compute at once what follows from the gates of an iteration that has begun.

    Called, if at all, right after `on_embeddings`; no answer may depend on it.
    """

    def begin_serving(self) -> None:
        """Note that the history is over and the cache starts cold."""

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities | None:
        """Answer the token embeddings (T, h) of an iteration before its first layer runs."""
        return None

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        """Answer the gate of one layer, after its on-demand loads were requested."""
        return None

    def end_iteration(self, iteration: Iteration) -> Priorities | None:
        """Close an iteration; the answer is for the next one."""
        return None

    def end_request(self, request: int) -> None:
        """Forget what was kept for a request."""

    def on_outcome(self, outcome: LayerOutcome) -> None:
        """Take note of which experts a layer used."""

    def on_load(self, expert: ExpertId) -> None:
        """Take note that an expert became resident."""

    def on_evict(self, expert: ExpertId) -> None:
        """Take note that a resident expert lost its slot."""

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Return keys in C order: of the residents that may leave, the largest goes.

        `urgent` says that `incoming` is loaded on demand; a prefetch evicts nobody whose key is
        -inf (see also `Placement.displaces_less`). The array may be the policy's own: the engine
        only reads it, and only at once.
        """
        raise NotImplementedError


FLOAT64 = np.dtype(np.float64)
Hook = Callable[..., Any]  # a bound method of a policy


class PolicyError(ValueError):
    """A hook of a policy raised, or answered what the engine cannot use."""


def refused(hook: Hook, layer: int, what: str) -> PolicyError:
    """Return the error that names a hook's system and, from 0 on, the layer it was asked about."""
    system = type(getattr(hook, "__self__", hook)).__name__
    where = f", layer {layer}" if layer >= 0 else ""
    return PolicyError(f"{system}.{hook.__name__}{where}: {' '.join(what.split())}")


def call_hook(hook: Hook, layer: int, *arguments: Any) -> Any:
    """Call a hook; PolicyError, with the line of the hook's own file, if it raises."""
    try:
        return hook(*arguments)
    except Exception as error:
        source = getattr(getattr(hook, "__code__", None), "co_filename", "")
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if f.filename == source), frames[-1])
        line = f"{Path(frame.filename).name}:{frame.lineno}"
        what = f"raised {type(error).__name__}: {error} ({line})"
        raise refused(hook, layer, what) from error


def check_table(hook: Hook, layer: int, table: Any, shape: tuple[int, int]) -> None:
    """Raise PolicyError unless a hook answered an array of float64 of this shape."""
    found = type(table).__name__
    if isinstance(table, np.ndarray):
        if table.dtype == FLOAT64 and table.shape == shape:
            return
        found = f"an array of {table.dtype}, shape {table.shape}"
    raise refused(hook, layer, f"answered {found}; give an array of float64, shape {shape}")
