"""Planner: one expected value of every expert decides what is fetched and what leaves.

Three parts. `GatePredictor` turns the input of a gate into probabilities that later layers activate
their experts; `UseValue` turns those, and how often a request used each expert, into the expected
uses of a resident; `PlannerPolicy` prefetches what is likely, and only over residents of less
value. docs/planner.md holds the mathematics and what each part is worth.
"""

from typing import Annotated, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from pydantic import Field
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
START_INPUTS = 128
"""Logits of the first layers that tell what token an embedding is of."""
SAMPLE = 16
"""Tokens of a prompt that stand for all of them."""
SLOPE = np.float32(0.05)
"""Added to the slope of Newton's steps, which is none where all is certain."""
NEWTON = 2
"""Steps to the shift of a token's probabilities."""
DISTRUST = 4.0
"""Tokens of history that a spread of 1 around the gates' own logits weighs as much as."""


@dataclass(frozen=True, config=CHECKED)
class PlannerOptions:
    """What docs/planner.md varies. Raises ValueError for a wrong value."""

    horizon: Count = 10
    """Layers that a gate's input tells of."""
    threshold: Share = 0.1
    """Probability of activation from which on an expert is prefetched."""
    discount: Share = 0.95
    """What a use one layer later is worth."""
    recency: Share = 0.05
    """Weight of one token in the average of a request's activations."""
    ridge: Annotated[Number, Field(ge=1e-3)] = 1.0
    """Strength with which the regression is held to the gates' own logits."""


class Regression:
    """Ridge regressions of S sources and H targets each, from sums over a history.

    Their inputs are 2 J that belong to the target (its own gate's logits, and what it said of the
    token before), M that the targets of a source share, and 1.
    """

    def __init__(self, sources: int, horizon: int, experts: int, shared: int, ridge: float) -> None:
        self._experts = experts
        width = 2 * experts + shared + 1
        self._gram = np.zeros((sources, horizon, width, width))
        self._cross = np.zeros((sources, horizon, width, experts))
        self._squares = np.zeros((sources, horizon))
        self._tokens = 0
        self._ridge = ridge * np.eye(width)

    def learn(self, source: int, own: FloatArray, shared: FloatArray, wanted: FloatArray) -> None:
        """Take in T tokens of one source: (H, T, 2 J), (T, M) and the truth (H, T, J)."""
        horizon, tokens, _ = own.shape
        known = np.ones((horizon, tokens, self._gram.shape[-1]))
        known[..., : own.shape[-1]] = own
        known[..., own.shape[-1] : -1] = shared
        self._gram[source] += known.swapaxes(1, 2) @ known
        self._cross[source] += known.swapaxes(1, 2) @ wanted
        self._squares[source] += (wanted.astype(np.float64) ** 2).sum(axis=(1, 2))
        self._tokens += tokens if source == 0 else 0

    def fit(self) -> None:
        """Solve them; without a history the gates' own logits stand."""
        experts = self._experts
        weights = np.linalg.solve(self._gram + self._ridge, self._cross + self._ridge[:, :experts])
        residual = self._squares - 2 * (weights * self._cross).sum(axis=(2, 3))
        residual += (weights * (self._gram @ weights)).sum(axis=(2, 3))
        residual = np.maximum(residual, 0) + DISTRUST * experts
        spread = np.sqrt(residual / ((self._tokens + DISTRUST) * experts))
        self._own = weights[:, :, : 2 * experts].astype(np.float32)
        shared = weights[:, :, 2 * experts : -1].swapaxes(1, 2).astype(np.float32)
        self._shared = shared.reshape(*shared.shape[:2], -1)
        self._shift = weights[:, :, -1:].astype(np.float32)
        self._scale = (LOGISTIC / spread).astype(np.float32)[:, :, None, None]

    def scores(self, first: int, own: FloatArray, shared: FloatArray) -> FloatArray:
        """Return logits over their spread, (S, H, T, J), for inputs (S, H, T, 2 J), (S, T, M)."""
        sources, horizon, tokens, _ = own.shape
        those = slice(first, first + sources)
        common = (shared @ self._shared[those]).reshape(sources, tokens, horizon, -1)
        logits = own @ self._own[those] + common.swapaxes(1, 2) + self._shift[those]
        return logits * self._scale[those]


class GatePredictor:
    """Later gates applied to an input, corrected by what a history showed.

    Source s is what layer s - 1 saw; it tells of layers s to s + H - 1, where layer L + t is layer
    t of the next token. Source 0 is the embedding and tells of all L layers. Logs are the centred
    logarithms of what gates said; those of a token, and in front of them those of the token before,
    are (2 L, T, J).
    """

    def __init__(self, shape: ModelShape, horizon: int, ridge: float) -> None:
        self.shape = shape
        self.horizon = min(horizon, shape.layers)
        layers, experts = shape.layers, shape.experts
        self._shared = min(layers * experts, START_INPUTS)
        self._start = Regression(1, layers, experts, self._shared, ridge)
        self._after = Regression(layers, self.horizon, experts, experts, ridge)
        self._sum = np.zeros((layers, experts))
        self._tokens = 0

    def set_gates(self, gates: GateWeights) -> None:
        """Take the gates; their logits are centred, as only differences count."""
        shape = self.shape
        self._weight = np.concatenate([centred(gates.weight, 1)] * 2)
        bias = gates.bias
        if bias is None:
            bias = np.zeros((shape.layers, shape.experts), np.float32)
        self._bias = np.concatenate([centred(bias)] * 2)[:, None]

    def learn(self, inputs: FloatArray, logs: FloatArray) -> None:
        """Take in tokens that follow one another: inputs (L + 1, T, h) and logs (L, T, J)."""
        if logs.shape[1] < 3:
            return
        before, now, after = logs[:, :-2], logs[:, 1:-1], logs[:, 2:]
        known, truth = np.concatenate([before, now]), np.concatenate([now, after])
        self._sum += now.sum(axis=1)
        self._tokens += now.shape[1]
        for source in range(self.shape.layers + 1):
            own, shared = self._inputs(source, inputs[source : source + 1, 1:-1], known)
            wanted = truth[self._targets(source, 1)[0]]
            self._of(source).learn(max(source - 1, 0), own[0], shared[0], wanted)

    def fit(self) -> None:
        """Solve the regressions."""
        self._start.fit()
        self._after.fit()
        self.usual = (self._sum / max(self._tokens, 1)).astype(np.float32)
        """Mean logs of the history, (L, J)."""

    def probabilities(self, first: int, inputs: FloatArray, logs: FloatArray) -> FloatArray:
        """Return how likely it is that some token activates an expert, (S, H, J).

        Of S sources from `first` on, or of source 0 alone: inputs (S, T, h), logs (2 L, T, J) as
        far as known.
        """
        tokens = inputs.shape[1]
        if tokens > SAMPLE:
            rows = np.linspace(0, tokens - 1, SAMPLE).astype(np.intp)
            inputs, logs = inputs[:, rows], logs[:, rows]
        own, shared = self._inputs(first, inputs, logs)
        scores = self._of(first).scores(max(first - 1, 0), own, shared)
        nobody: FloatArray = unlikely(scores, self.shape.top_k).prod(axis=2)
        return 1 - nobody ** max(1.0, tokens / SAMPLE)

    def _of(self, source: int) -> Regression:
        return self._after if source else self._start

    def _targets(self, first: int, sources: int) -> NDArray[np.intp]:
        """Return the layers that sources tell of, (S, H)."""
        ahead = self.horizon if first else self.shape.layers
        return first + np.arange(sources)[:, None] + np.arange(ahead)

    def _inputs(
        self, first: int, inputs: FloatArray, logs: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return what regressions from source `first` on take: (S, H, T, 2 J) and (S, T, M)."""
        sources, tokens, hidden = inputs.shape
        experts, targets = self.shape.experts, self._targets(first, sources)
        ahead = targets.shape[1]
        # Windows of gates, which overlap: (S, H * J, h).
        layer, row, one = self._weight.strides
        size, strides = (sources, ahead * experts, hidden), (layer, row, one)
        gates = as_strided(self._weight[first:], size, strides, writeable=False)
        logits = (inputs @ gates.swapaxes(1, 2)).reshape(sources, tokens, ahead, experts)
        own = np.empty((sources, ahead, tokens, 2 * experts), np.float32)
        np.add(logits.swapaxes(1, 2), self._bias[targets], out=own[..., :experts])
        own[..., experts:] = logs[targets]
        if not first:
            return own, logits.reshape(1, tokens, -1)[..., : self._shared]
        said = self.shape.layers + first - 1
        return own, logs[said : said + sources]


class UseValue:
    """How often requests use each expert, and what a resident is worth by that and by predictions.

    The value of an expert is its discounted expected uses: the probability of the next visit of its
    layer being one, and from then on, once every L layers, the average of the running requests.
    """

    def __init__(self, shape: ModelShape, discount: float, recency: float) -> None:
        self.shape = shape
        self._recency = recency
        self._counts = np.zeros((shape.layers, shape.experts))
        self._tokens = 0
        layers = np.arange(shape.layers)
        # By the next layer to be run: layers until each layer's next visit, from 1 on.
        away = (layers - np.arange(shape.layers + 1)[:, None]) % shape.layers + 1.0
        self.away = away[:, :, None]
        self._near = discount**self.away
        later = min(discount, 1 - 1e-9) ** shape.layers
        self._far = self._near * later / (1 - later)
        self.forget()

    def learn(self, probabilities: FloatArray) -> None:
        """Count what gates choose, (L, T, J)."""
        self._counts += chosen(probabilities, self.shape.top_k).sum(axis=1)
        self._tokens += probabilities.shape[1]

    def forget(self) -> None:
        """Forget all requests; the history is over."""
        self._running: dict[int, Table] = {}
        share = self.shape.top_k / self.shape.experts
        self._usual = (self._counts + share) / (self._tokens + 1)
        self.begin(())

    def begin(self, requests: tuple[int, ...]) -> None:
        """Go by the averages of these requests; new ones start with the history's frequencies."""
        for request in requests:
            self._running.setdefault(request, self._usual.copy())
        averages = [self._running[request] for request in requests]
        self.rates = union(averages or [self._usual])

    def end(self, request: int) -> None:
        """Forget a request's average."""
        self._running.pop(request, None)

    def observe(self, iteration: Iteration, gate: Gate) -> None:
        """Have the averages follow what the tokens of each request chose."""
        uses = chosen(gate.probabilities, self.shape.top_k)
        averages = []
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            average = self._running[request][gate.layer]
            weight = 1 - (1 - self._recency) ** (rows.stop - rows.start)
            average += weight * (uses[rows].mean(axis=0) - average)
            averages.append(average)
        self.rates[gate.layer] = union(averages)

    def of(self, following: int, likely: Table) -> Table:
        """Return the value of every expert before layer `following` runs.

        `likely` (L, J) are the probabilities of the next visit.
        """
        return self._near[following] * likely + self._far[following] * self.rates


class PlannerPolicy(Policy):
    """Prefetches by probability over the root of the distance; the least valuable resident goes."""

    placement = Placement("background", hidden_states=True, replaces=True)

    def __init__(self, shape: ModelShape, options: PlannerOptions) -> None:
        self.shape = shape
        self.options = options
        self.predictor = GatePredictor(shape, options.horizon, options.ridge)
        self.value = UseValue(shape, options.discount, options.recency)
        self.set_gates = self.predictor.set_gates
        self._rows: dict[int, list[tuple[FloatArray, FloatArray]]] = {}
        self._nearness = 1 / np.sqrt(self.value.away)
        self.begin_serving()

    def begin_serving(self) -> None:
        self.predictor.fit()
        self.value.forget()
        self._said: dict[int, FloatArray] = {}
        self._logs: FloatArray = np.empty((0, 0, 0), np.float32)
        self._ahead: FloatArray | None = None
        self._absent = np.ones((self.shape.layers, self.shape.experts), dtype=bool)
        self._likely = self.value.rates.copy()
        """Probabilities of the next visit, as far as known."""
        self._keys = -self.value.of(0, self._likely)

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
        self._said.pop(request, None)
        if rows := self._rows.pop(request, []):
            inputs, logs = (np.concatenate(parts, axis=1) for parts in zip(*rows, strict=True))
            self.predictor.learn(inputs, logs)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities | None:
        self._ahead = None
        self.value.begin(iteration.requests)
        layers, tokens = self.shape.layers, len(embeddings)
        self._logs = np.zeros((2 * layers, tokens, self.shape.experts), np.float32)
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            before = self._said.get(request, self.predictor.usual)
            self._logs[:layers, rows] = before[:, None]
        self._likely[:] = self.predictor.probabilities(0, embeddings[None], self._logs)[0]
        return self._plan(0)

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        assert gates.hidden_states is not None
        self._logs[self.shape.layers :] = logarithms(gates.probabilities)
        self._ahead = self.predictor.probabilities(1, gates.hidden_states, self._logs)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        self.value.observe(iteration, gate)
        following, layers = gate.layer + 1, self.shape.layers
        self._likely[gate.layer] = self.value.rates[gate.layer]
        if self._ahead is None:
            assert gate.hidden_states is not None
            self._logs[layers + gate.layer] = logarithms(gate.probabilities)
            inputs = gate.hidden_states[None]
            likely = self.predictor.probabilities(following, inputs, self._logs)[0]
        else:
            likely = self._ahead[gate.layer]
        here = layers - following
        self._likely[following : following + len(likely)] = likely[:here]
        self._likely[: max(len(likely) - here, 0)] = likely[here:]
        return self._plan(following)

    def end_iteration(self, iteration: Iteration) -> Priorities | None:
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            self._said[request] = self._logs[self.shape.layers :, rows.stop - 1].copy()
        return self._plan(0)

    def on_load(self, expert: ExpertId) -> None:
        self._absent[expert] = False

    def on_evict(self, expert: ExpertId) -> None:
        self._absent[expert] = True

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Least value first; a prefetch keeps what is worth no less than itself."""
        keys = self._keys
        return keys if urgent else np.where(keys > keys[incoming], keys, -np.inf)

    def _plan(self, following: int) -> Priorities | None:
        """Value all experts before layer `following` runs; ask for the likely ones from it on."""
        self._keys = -self.value.of(following, self._likely)
        wanted = (self._likely >= self.options.threshold) & self._absent
        wanted[:following] = False
        return np.where(wanted, self._likely * self._nearness[following], 0.0)


def chosen(probabilities: FloatArray, count: int) -> Table:
    """Return 1 for the `count` experts that each token goes to, else 0, in the same shape."""
    best = (-probabilities).argpartition(count - 1, axis=-1)[..., :count]
    uses = np.zeros(probabilities.shape)
    np.put_along_axis(uses, best, 1.0, axis=-1)
    return uses


def unlikely(scores: FloatArray, count: int) -> FloatArray:
    """Return how likely it is that a token does not activate an expert, by scores (..., J).

    A score counts from the middle between the `count`-th and the next one; then all are shifted
    until `count` experts are expected, by Newton's method.
    """
    last = min(count, scores.shape[-1] - 1)
    ordered = np.partition(-scores, (count - 1, last), axis=-1)
    border = (ordered[..., count - 1, None] + ordered[..., last, None]) / 2
    margin = np.clip(-scores - border, -30, 30)
    for step in range(NEWTON + 1):
        rest: FloatArray = (1 / (1 + np.exp(-margin))).astype(np.float32, copy=False)
        if step < NEWTON:
            likely = 1 - rest
            slope = (likely * rest).sum(axis=-1, keepdims=True) + SLOPE
            margin += np.clip((likely.sum(axis=-1, keepdims=True) - count) / slope, -2, 2)
    return rest


def union(rates: list[Table]) -> Table:
    """Return the probability that any of several happens."""
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
