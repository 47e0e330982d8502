"""What the input of one gate tells of later gates, in closed form: a part of the planner.

Nothing here is as wide as the hidden state but the gates themselves, so a few thousand tokens of
history suffice. docs/planner.md holds the mathematics.
"""

from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from finemoe.offload.policy import FloatArray, GateWeights, ModelShape

SMALLEST_PROBABILITY = np.float32(1e-7)  # of a gate, before its logarithm is taken
LOGISTIC = 1.7  # the logistic of 1.7 x is the normal distribution function of x, within 0.01
START_INPUTS = 128  # logits of the first layers' gates that tell what token an embedding is of
AFTER_INPUTS = 48  # of the next layers' whole gates, which all targets share later on
SAMPLE = 16  # tokens of a prompt that stand for all of them
NEWTON = 2  # steps to the shift of a token's probabilities
FLATTEST = np.float32(0.05)  # added to the slope that they divide by: where all is certain, it is 0
DISTRUST = 4.0  # tokens of history that a spread of 1 around the gates' own logits weighs


class Regression:
    """Ridge regressions of S sources and H targets each, from sums over a history.

    Their inputs are 3 J that belong to the target (its own gate's logits, what it said of the
    token before, and how often neighbours used each expert), M that the targets of a source share,
    and 1.
    """

    def __init__(self, sources: int, horizon: int, experts: int, shared: int, ridge: float) -> None:
        self._experts = experts
        width = 3 * experts + shared + 1
        self._gram = np.zeros((sources, horizon, width, width))
        self._cross = np.zeros((sources, horizon, width, experts))
        self._squares = np.zeros((sources, horizon))
        self._tokens = 0
        self._ridge = ridge * np.eye(width)

    def learn(self, source: int, own: FloatArray, shared: FloatArray, wanted: FloatArray) -> None:
        """Take in T tokens of one source: (H, T, 3 J), (T, M) and the truth (H, T, J)."""
        horizon, tokens, _ = own.shape
        known = np.ones((horizon, tokens, self._gram.shape[-1]), np.float32)
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
        self._own = weights[:, :, : 3 * experts].astype(np.float32)
        shared = weights[:, :, 3 * experts : -1].swapaxes(1, 2).astype(np.float32)
        self._shared = shared.reshape(*shared.shape[:2], -1)
        self._shift = weights[:, :, -1:].astype(np.float32)
        self._scale = (LOGISTIC / spread).astype(np.float32)[:, :, None, None]

    def scores(self, first: int, own: FloatArray, shared: FloatArray) -> FloatArray:
        """Return logits over their spread, (S, H, T, J), for inputs (S, H, T, 3 J), (S, T, M)."""
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
        self._start_inputs = min(layers * experts, START_INPUTS)
        self._after_inputs = min(self.horizon, AFTER_INPUTS // experts) * experts
        self._start = Regression(1, layers, experts, self._start_inputs, ridge)
        self._after = Regression(layers, self.horizon, experts, self._after_inputs + experts, ridge)
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

    def learn(self, inputs: FloatArray, logs: FloatArray, lessons: Iterable[FloatArray]) -> None:
        """Take in T > 2 tokens that follow one another: inputs (L + 1, T, h) and logs (L, T, J).

        `lessons` are what neighbours used, (T - 2, H, J) of each source (`MapMemory.lessons`).
        """
        before, now, after = logs[:, :-2], logs[:, 1:-1], logs[:, 2:]
        known, truth = np.concatenate([before, now]), np.concatenate([now, after])
        self._sum += now.sum(axis=1)
        self._tokens += now.shape[1]
        for source, uses in enumerate(lessons):
            those = inputs[source : source + 1, 1:-1]
            own, shared = self._inputs(source, those, known, uses.swapaxes(0, 1))
            wanted = truth[self.targets(source, 1)[0]]
            self._of(source).learn(max(source - 1, 0), own[0], shared[0], wanted)

    def fit(self) -> None:
        self._start.fit()
        self._after.fit()
        self.usual = (self._sum / max(self._tokens, 1)).astype(np.float32)
        """Mean logs of the history, (L, J)."""

    def unlikely(
        self, first: int, inputs: FloatArray, logs: FloatArray, uses: FloatArray
    ) -> tuple[FloatArray, NDArray[np.intp]]:
        """Return how likely it is that a token goes elsewhere, (S, H, T, J), and the layers (S, H).

        Of S sources from `first` on, or of source 0 alone: inputs (S, T, h), logs (2 L, T, J) as
        far as known, and what neighbours used, (S, T, 2 L, J).
        """
        targets = self.targets(first, len(inputs))
        near = uses.swapaxes(1, 2)[np.arange(len(inputs))[:, None], targets]
        own, shared = self._inputs(first, inputs, logs, near)
        scores = self._of(first).scores(max(first - 1, 0), own, shared)
        return unlikely(scores, self.shape.top_k), targets

    def _of(self, source: int) -> Regression:
        return self._after if source else self._start

    def targets(self, first: int, sources: int) -> NDArray[np.intp]:
        """Return the layers that sources tell of, (S, H)."""
        ahead = self.horizon if first else self.shape.layers
        return first + np.arange(sources)[:, None] + np.arange(ahead)

    def _inputs(
        self, first: int, inputs: FloatArray, logs: FloatArray, uses: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return what regressions from source `first` on take: (S, H, T, 3 J) and (S, T, M)."""
        sources, tokens, hidden = inputs.shape
        experts, targets = self.shape.experts, self.targets(first, sources)
        ahead = targets.shape[1]
        # Windows of gates, which overlap: (S, H * J, h).
        layer, row, one = self._weight.strides
        size, strides = (sources, ahead * experts, hidden), (layer, row, one)
        gates = as_strided(self._weight[first:], size, strides, writeable=False)
        logits = (inputs @ gates.swapaxes(1, 2)).reshape(sources, tokens, ahead, experts)
        own = np.empty((sources, ahead, tokens, 3 * experts), np.float32)
        np.add(logits.swapaxes(1, 2), self._bias[targets], out=own[..., :experts])
        own[..., experts : 2 * experts] = logs[targets]
        own[..., 2 * experts :] = uses
        logits = logits.reshape(sources, tokens, -1)
        if not first:
            return own, logits[..., : self._start_inputs]
        said = self.shape.layers + first - 1
        shared = [logits[..., : self._after_inputs], logs[said : said + sources]]
        return own, np.concatenate(shared, axis=-1)


def unlikely(scores: FloatArray, count: int) -> FloatArray:
    """Return how likely it is that a token does not activate an expert, by scores (..., J).

    A score counts from the middle between the `count`-th and the next one; then all are shifted
    until `count` experts are expected, by Newton's method.
    """
    last = min(count, scores.shape[-1] - 1)
    ordered = np.partition(-scores, (count - 1, last), axis=-1)
    border = (ordered[..., count - 1, None] + ordered[..., last, None]) / 2
    margin = np.minimum(np.maximum(-scores - border, -30), 30)
    for _ in range(NEWTON):
        likely = 1 / (1 + np.exp(margin))
        slope = (likely * (1 - likely)).sum(axis=-1, keepdims=True) + FLATTEST
        step = (likely.sum(axis=-1, keepdims=True) - count) / slope
        margin += np.minimum(np.maximum(step, -2), 2)
    return np.reciprocal(1 + np.exp(-margin))


def centred(values: FloatArray, axis: int = -1) -> FloatArray:
    """Return values less their mean along an axis."""
    return values - values.mean(axis=axis, keepdims=True)


def logarithms(probabilities: FloatArray) -> FloatArray:
    """Return the centred logarithms of what gates said."""
    return centred(np.log(np.maximum(probabilities, SMALLEST_PROBABILITY)))
