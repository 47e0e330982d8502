"""Planner: one expected value of every expert decides what is fetched and what leaves.

Three parts. `GatePredictor` turns the input of a gate into probabilities that later layers activate
their experts; `UseValue` turns those, and how often a request used each expert, into the expected
uses of a resident; `PlannerPolicy` prefetches what is likely, and only over residents of less
value. docs/planner.md holds the mathematics and what each part is worth.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    GateWeights,
    Iteration,
    ModelShape,
    Placement,
    Policy,
    Priorities,
    Table,
)
from finemoe.options import CHECKED, Count, Number, Share

SMALLEST_PROBABILITY = 1e-7
"""Of a gate, before its logarithm is taken."""
LOGISTIC = 1.7
"""The logistic of 1.7 x is the normal distribution function of x, within 0.01."""
DISTRUST = 4.0
"""Tokens of history that a spread of 1 around the gates' own logits weighs as much as."""


@dataclass(frozen=True, config=CHECKED)
class PlannerOptions:
    """What docs/planner.md varies. Raises ValueError for a wrong value."""

    horizon: Count = 10
    """Layers that a gate's input tells of."""
    threshold: Share = 0.4
    """Probability of activation from which on an expert is prefetched."""
    discount: Share = 0.95
    """What a use one layer later is worth."""
    memory: Share = 0.2
    """Weight of one token in the average of a request's activations."""
    ridge: Number = 1.0
    """Strength with which the regression is held to the gates' own logits."""


class GatePredictor:
    """Later gates applied to an input, corrected by a ridge regression on what a history showed.

    Source s is what layer s - 1 saw, or for s = 0 the embedding; it tells of layers s to s + H - 1,
    where layer L + t is layer t of the next token.
    """

    def __init__(self, shape: ModelShape, horizon: int, ridge: float) -> None:
        self.shape = shape
        self.horizon = min(horizon, shape.layers)
        self._ridge = ridge
        experts, sources = shape.experts, shape.layers + 1
        # Gram matrices of the inputs: logits (J), log-probabilities seen (J), 1.
        inputs = 2 * experts + 1
        self._gram = np.zeros((sources, self.horizon, inputs, inputs))
        self._cross = np.zeros((sources, self.horizon, inputs, experts))
        self._squares = np.zeros((sources, self.horizon))
        self._tokens = 0
        self._gates: FloatArray = np.zeros((sources, 0, 0), np.float32)
        self._biases: FloatArray = np.zeros((sources, 1, 0), np.float32)

    def set_gates(self, gates: GateWeights) -> None:
        """Take the gates; their logits are centred, as only differences count."""
        shape, horizon = self.shape, self.horizon
        weight = np.concatenate([centred(gates.weight, 1)] * 2)
        bias = np.zeros((shape.layers, shape.experts), np.float32)
        if gates.bias is not None:
            bias = centred(gates.bias, 1)
        bias = np.concatenate([bias] * 2)
        # Windows of H layers, which overlap: (sources, H * J, h) and (sources, 1, H * J).
        layer, row, one = weight.strides
        sources, width = shape.layers + 1, horizon * shape.experts
        size = (sources, width, shape.hidden_size)
        self._gates = as_strided(weight, size, (layer, row, one), writeable=False)
        strides = (bias.strides[0], 0, bias.strides[1])
        self._biases = as_strided(bias, (sources, 1, width), strides, writeable=False)

    def learn(self, inputs: FloatArray, logs: FloatArray) -> None:
        """Take in tokens that follow one another: inputs (L + 1, T, h) and logs (L, T, J)."""
        tokens, experts = inputs.shape[1] - 1, self.shape.experts
        if tokens < 1:
            return
        targets = np.concatenate([logs[:, :-1], logs[:, 1:]]).astype(np.float64)
        self._tokens += tokens
        for source in range(self.shape.layers + 1):
            logits = self._logits(source, inputs[source : source + 1, :-1])[0]
            known = np.ones((self.horizon, tokens, 2 * experts + 1))
            known[..., :experts] = logits
            known[..., experts:-1] = logs[source - 1, :-1] if source else 0.0
            wanted = targets[source : source + self.horizon]
            self._gram[source] += known.swapaxes(1, 2) @ known
            self._cross[source] += known.swapaxes(1, 2) @ wanted
            self._squares[source] += (wanted**2).sum(axis=(1, 2))

    def fit(self) -> None:
        """Solve the regressions; without a history the gates' own logits stand."""
        experts = self.shape.experts
        prior = self._ridge * np.eye(self._gram.shape[-1])
        own = prior[:, :experts]
        weights = np.linalg.solve(self._gram + prior, self._cross + own)
        residual = self._squares - 2 * (weights * self._cross).sum(axis=(2, 3))
        residual += (weights * (self._gram @ weights)).sum(axis=(2, 3))
        residual = np.maximum(residual, 0) + DISTRUST * experts
        spread = np.sqrt(residual / ((self._tokens + DISTRUST) * experts))
        self._own = weights[:, :, :experts].astype(np.float32)
        seen = weights[:, :, experts:-1].swapaxes(1, 2)
        self._seen = np.ascontiguousarray(seen, np.float32).reshape(len(seen), experts, -1)
        self._shift = weights[:, :, -1:].astype(np.float32)
        self._scale = (LOGISTIC / spread).astype(np.float32)[:, :, None, None]

    def probabilities(self, first: int, inputs: FloatArray, logs: FloatArray) -> FloatArray:
        """Return how likely it is that some token activates an expert, (S, H, J).

        Of S sources from `first` on: inputs (S, T, h), logs of the gates seen (S, T, J).
        """
        sources, tokens, _ = inputs.shape
        stop, count = first + sources, self.shape.top_k
        scores = self._logits(first, inputs) @ self._own[first:stop]
        seen = (logs @ self._seen[first:stop]).reshape(sources, tokens, self.horizon, -1)
        scores += seen.swapaxes(1, 2)
        scores += self._shift[first:stop]
        last = min(count, self.shape.experts - 1)
        ordered = np.partition(-scores, (count - 1, last), axis=-1)
        border = (ordered[..., count - 1, None] + ordered[..., last, None]) / 2
        with np.errstate(over="ignore"):
            unlikely = np.exp((scores + border) * self._scale[first:stop])
        # 1 - p = 1 / (1 + exp(margin / spread)).
        return 1 - (1 / (1 + unlikely)).prod(axis=2)

    def _logits(self, first: int, inputs: FloatArray) -> FloatArray:
        """Return what the later gates make of inputs (S, T, h): (S, H, T, J)."""
        stop = first + len(inputs)
        logits = inputs @ self._gates[first:stop].swapaxes(1, 2) + self._biases[first:stop]
        windows = logits.reshape(*logits.shape[:2], self.horizon, self.shape.experts)
        return windows.swapaxes(1, 2)


class UseValue:
    """How often requests use each expert, and what a resident is worth by that and by predictions.

    The value of an expert is its discounted expected uses: the probability of the next visit of its
    layer being one, and from then on, once every L layers, the average of the running requests.
    """

    def __init__(self, shape: ModelShape, discount: float, memory: float) -> None:
        self.shape = shape
        self._memory = memory
        self._counts = np.zeros((shape.layers, shape.experts))
        self._tokens = 0
        layers = np.arange(shape.layers)
        # By the next layer to be run: layers until each layer's next visit, from 1 on.
        away = (layers - np.arange(shape.layers + 1)[:, None]) % shape.layers + 1
        self._near = (discount**away)[:, :, None]
        later = min(discount, 1 - 1e-9) ** shape.layers
        self._far = self._near * later / (1 - later)
        self._running: dict[int, Table] = {}
        self.begin((), forget=True)

    def learn(self, probabilities: FloatArray) -> None:
        """Count what gates choose, (L, T, J)."""
        self._counts += chosen(probabilities, self.shape.top_k).sum(axis=1)
        self._tokens += probabilities.shape[1]

    def begin(self, requests: tuple[int, ...], forget: bool = False) -> None:
        """Go by the averages of these requests; new ones start with the history's frequencies."""
        if forget:
            self._running.clear()
            share = self.shape.top_k / self.shape.experts
            self._usual = (self._counts + share) / (self._tokens + 1)
        for request in requests:
            self._running.setdefault(request, self._usual.copy())
        self._requests = requests
        averages = [self._running[request] for request in requests]
        self.rates = union(averages) if averages else self._usual.copy()

    def end(self, request: int) -> None:
        """Forget a request's average."""
        self._running.pop(request, None)

    def observe(self, iteration: Iteration, gate: Gate) -> None:
        """Have the averages follow what the tokens of each request chose."""
        if iteration.requests != self._requests:
            self.begin(iteration.requests)
        uses = chosen(gate.probabilities, self.shape.top_k)
        averages = []
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            average = self._running[request][gate.layer]
            weight = 1 - (1 - self._memory) ** (rows.stop - rows.start)
            average += weight * (uses[rows].mean(axis=0) - average)
            averages.append(average)
        self.rates[gate.layer] = union(averages)

    def of(self, following: int, layers: NDArray[np.intp], likely: FloatArray) -> Table:
        """Return the value of every expert before layer `following` runs.

        `likely` (N, J) are the probabilities of the next visits of N `layers`.
        """
        expected = self.rates.copy()
        expected[layers] = likely
        return self._near[following] * expected + self._far[following] * self.rates


class PlannerPolicy(Policy):
    """Prefetches by probability over the root of the distance; the least valuable resident goes."""

    placement = Placement("background", hidden_states=True, replaces=True)

    def __init__(self, shape: ModelShape, options: PlannerOptions) -> None:
        self.shape = shape
        self.options = options
        self.predictor = GatePredictor(shape, options.horizon, options.ridge)
        self.value = UseValue(shape, options.discount, options.memory)
        self.set_gates = self.predictor.set_gates
        self._rows: dict[int, list[tuple[FloatArray, FloatArray]]] = {}
        steps = np.arange(self.predictor.horizon)
        self._targets = (np.arange(shape.layers + 1)[:, None] + steps) % shape.layers
        self._nearness = 1 / np.sqrt(steps + 1)[:, None]
        self.begin_serving()

    def begin_serving(self) -> None:
        self.predictor.fit()
        self.value.begin((), forget=True)
        self._ahead: FloatArray | None = None
        self._next: Priorities | None = None
        self._keys = -self.value.of(0, self._targets[0, :0], np.empty((0, 1), np.float32))

    def learn(self, iteration: Iteration, embeddings: FloatArray, gates: Gates) -> None:
        assert gates.hidden_states is not None
        inputs = np.concatenate([embeddings[None], gates.hidden_states])
        logs = logarithms(gates.probabilities)
        self.value.learn(gates.probabilities)
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            seen = (inputs[:, rows], logs[:, rows])
            self._rows.setdefault(request, []).append(seen)

    def end_request(self, request: int) -> None:
        self.value.end(request)
        if rows := self._rows.pop(request, []):
            inputs, logs = (np.concatenate(parts, axis=1) for parts in zip(*rows, strict=True))
            self.predictor.learn(inputs, logs)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        self._ahead = None
        self.value.begin(iteration.requests)
        unseen = np.zeros((1, len(embeddings), self.shape.experts), np.float32)
        return self._plan(0, self.predictor.probabilities(0, embeddings[None], unseen)[0])

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        assert gates.hidden_states is not None
        logs = logarithms(gates.probabilities)
        self._ahead = self.predictor.probabilities(1, gates.hidden_states, logs)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        self.value.observe(iteration, gate)
        following = gate.layer + 1
        if self._ahead is not None:
            return self._plan(following, self._ahead[gate.layer])
        assert gate.hidden_states is not None
        logs = logarithms(gate.probabilities[None])
        likely = self.predictor.probabilities(following, gate.hidden_states[None], logs)
        return self._plan(following, likely[0])

    def end_iteration(self, iteration: Iteration) -> Priorities | None:
        return self._next

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Least value first; a prefetch keeps what is worth no less than itself."""
        keys = self._keys
        return keys if urgent else np.where(keys > keys[incoming], keys, -np.inf)

    def _plan(self, following: int, likely: FloatArray) -> Priorities | None:
        """Value all experts by what is likely (H, J) from layer `following` on; ask for some."""
        layers = self._targets[following]
        self._keys = -self.value.of(following, layers, likely)
        wanted = np.where(likely >= self.options.threshold, likely * self._nearness, 0.0)
        here = min(self.shape.layers - following, len(layers))
        requests = np.zeros((2, self.shape.layers, self.shape.experts))
        requests[0, layers[:here]] = wanted[:here]
        requests[1, layers[here:]] = wanted[here:]
        self._next = requests[1]
        return requests[0]


def chosen(probabilities: FloatArray, count: int) -> Table:
    """Return 1 for the `count` experts that each token goes to, else 0, in the same shape."""
    best = (-probabilities).argpartition(count - 1, axis=-1)[..., :count]
    uses = np.zeros(probabilities.shape)
    np.put_along_axis(uses, best, 1.0, axis=-1)
    return uses


def union(rates: list[Table]) -> Table:
    """Return the probability that any of several happens."""
    if len(rates) == 1:
        return rates[0].copy()
    return 1 - np.prod([1 - rate for rate in rates], axis=0)


def centred(values: FloatArray, axis: int = -1) -> FloatArray:
    """Return values less their mean along an axis."""
    return values - values.mean(axis=axis, keepdims=True)


def logarithms(probabilities: FloatArray) -> FloatArray:
    """Return the centred logarithms of what gates said."""
    return centred(np.log(np.maximum(probabilities, np.float32(SMALLEST_PROBABILITY))))


def planner(shape: ModelShape, **options: Any) -> PlannerPolicy:
    """Return the policy for `PlannerOptions` given one by one; ValueError for a wrong value."""
    return PlannerPolicy(shape, PlannerOptions(**options))
