"""What tokens of like maps activated, and the tokens after them: a part of the planner.

A token's map is what its gates said, as FineMoE's (section 4.1); here one is kept a token, in their
order. docs/planner.md holds the mathematics.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import FloatArray, ModelShape, Table

NEIGHBOURS = 16
SHARPNESS = np.float32(60.0)  # a neighbour weighs the exponential of its likeness times this
SHORTEST = np.float32(1e-12)
CONTEXT = np.float32(0.3)  # how much the likeness of the tokens before counts beside one's own


class MapMemory:
    """The last `capacity` tokens of finished requests, request by request.

    Maps are centred logarithms. The token after entry n is entry n + 1, so the last one of a
    request is nobody's neighbour. Likenesses are (..., N), for N entries.
    """

    def __init__(self, shape: ModelShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        layers, experts = shape.layers, shape.experts
        self._maps = np.zeros((layers, capacity, experts), np.float32)
        self._scales = np.ones((layers, capacity), np.float32)
        """One over each map's length, as far as each layer."""
        self._flat = shape.experts * np.arange(layers)[:, None]
        self._chosen = np.tile(self._flat, (capacity, 1, shape.top_k))
        """Whom each token went to, by flat indices."""
        self._barred = np.full(capacity, -np.inf, np.float32)
        """Added to a likeness: 0, or for who is nobody's neighbour what makes it the least."""
        self._end = self._tokens = 0
        self._uses = np.zeros(shape.size)
        self.is_empty = True

    def add(self, logs: FloatArray) -> None:
        """Take in the tokens of a request, (L, T, J), in place of the oldest."""
        logs = logs[:, max(logs.shape[1] - self.capacity, 0) :]
        rows = (self._end + np.arange(logs.shape[1])) % max(self.capacity, 1)
        self._maps[:, rows] = logs
        self._scales[:, rows] = scale((logs**2).sum(axis=-1).cumsum(axis=0))
        went = self._flat + best(logs, self.shape.top_k).swapaxes(0, 1)
        self._chosen[rows] = went
        self._uses += np.bincount(went.ravel(), minlength=self.shape.size)
        self._tokens += len(rows)
        self._barred[rows] = 0
        self._barred[rows[-1:]] = -np.inf
        self._end = (self._end + len(rows)) % max(self.capacity, 1)
        self.is_empty = not (self._barred == 0).any()

    @property
    def usual(self) -> Table:
        """How often a token used each expert, (L, J)."""
        return (self._uses / max(self._tokens, 1)).reshape(self.shape.layers, -1)

    def begin(self, context: FloatArray) -> None:
        """Begin with T tokens, of which nothing is known but `context`, (T, N)."""
        self._context, self._layer = context, 0
        self._dots = np.zeros(context.shape, np.float32)
        self._squares = np.zeros((len(context), 1), np.float32)
        self.cosines = np.zeros(context.shape, np.float32)
        """Of the tokens' maps with all entries', as far as they are known."""

    def compare(self, logs: FloatArray) -> FloatArray:
        """Take what S more layers said of the tokens, (S, T, J); return likenesses (S, T, N)."""
        layers = slice(self._layer, self._layer + len(logs))
        alike: FloatArray = logs @ self._maps[layers].swapaxes(1, 2)
        for layer, dots, squares in zip(
            range(layers.start, layers.stop),
            alike,
            (logs**2).sum(axis=-1, keepdims=True),
            strict=True,
        ):
            self._dots += dots
            self._squares += squares
            self.cosines = self._dots * self._scales[layer] * scale(self._squares)
            np.add(self.cosines, self._context, out=dots)
        self._layer = layers.stop
        return alike

    def context(self, cosines: FloatArray) -> FloatArray:
        """Return what is known of the tokens that follow those of these cosines."""
        return CONTEXT * np.roll(cosines, 1, axis=-1)

    def uses(self, alike: FloatArray, start: int, stop: int) -> FloatArray:
        """Return how often neighbours used experts, (..., stop - start, J); zeros while empty.

        Layer L + t is layer t of the tokens after them.
        """
        layers, experts = self.shape.layers, self.shape.experts
        whole = (*alike.shape[:-1], stop - start, experts)
        if self.is_empty:
            return np.zeros(whole, np.float32)
        alike = (alike + self._barred).reshape(-1, self.capacity)
        nearest = best(alike, min(NEIGHBOURS, self.capacity))
        scores = np.take_along_axis(alike, nearest, axis=1)
        weights = np.exp(SHARPNESS * (scores - scores.max(axis=1, keepdims=True)))
        weights /= weights.sum(axis=1, keepdims=True)
        own = self._chosen[nearest, min(start, layers) : min(stop, layers)]
        later = slice(max(start - layers, 0), max(stop - layers, 0))
        after = self._chosen[(nearest + 1) % self.capacity, later] + self.shape.size
        flat = np.concatenate([own, after], axis=2).reshape(*nearest.shape, -1)
        row = (stop - start) * experts
        flat += row * np.arange(len(flat))[:, None, None] - start * experts
        weighed = weights.repeat(flat.shape[2])
        used = np.bincount(flat.ravel(), weighed, minlength=row * len(flat))
        return np.minimum(used, 1).astype(np.float32).reshape(whole)

    def lessons(self, logs: FloatArray, horizon: int) -> Iterator[FloatArray]:
        """Yield what neighbours used of a request's tokens (L, T, J) but the first and the last.

        Before layer 0 of all layers, and then after each of the `horizon` next ones: (T - 2, H, J).
        """
        layers = self.shape.layers
        dots = np.tensordot(logs, self._maps, axes=([0, 2], [0, 2]))
        lengths = scale((logs**2).sum(axis=(0, 2)))[:, None]
        context = self.context(dots * lengths * self._scales[-1])[:-2]
        yield self.uses(context, 0, layers)
        self.begin(context)
        for layer in range(layers):
            (alike,) = self.compare(logs[layer : layer + 1, 1:-1])
            yield self.uses(alike, layer + 1, layer + 1 + horizon)


def scale(squares: FloatArray) -> FloatArray:
    """Return one over the lengths of maps by their squares."""
    lengths: FloatArray = np.sqrt(np.maximum(squares, SHORTEST))
    return np.reciprocal(lengths)


def best(scores: FloatArray, count: int) -> NDArray[np.intp]:
    """Return the indices of the `count` largest of the last axis, in any order."""
    return (-scores).argpartition(count - 1, axis=-1)[..., :count]


def chosen(scores: FloatArray, count: int) -> FloatArray:
    """Return 1 for the `count` experts that each token goes to, else 0, in the same shape."""
    uses = np.zeros(scores.shape, np.float32)
    rows = uses.reshape(-1, scores.shape[-1])
    rows[np.arange(len(rows))[:, None], best(scores, count).reshape(len(rows), -1)] = 1
    return uses
