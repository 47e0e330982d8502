"""One iteration as a trace knows it: what was routed, without the model that did it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import FloatArray, Iteration, Phase


@dataclass(frozen=True)
class RoutedStep:
    """What one request routed in one iteration of T tokens; None where a trace does not say it."""

    tokens: int
    counts: NDArray[np.integer]  # tokens that go to each expert, shape (L, J)
    logits: FloatArray | None  # gate logits as the model computed them, shape (L, T, J)
    embeddings: FloatArray | None  # token embeddings, shape (T, h)
    hidden_states: FloatArray | None  # inputs of the gates, shape (L, T, h)


@dataclass(frozen=True)
class RoutedIteration:
    """The steps of all requests of one iteration, rows in the order of the requests."""

    iteration: Iteration
    steps: tuple[RoutedStep, ...]
    contexts: tuple[int, ...]  # tokens that each request attends to, its own included

    @cached_property
    def counts(self) -> NDArray[np.integer]:
        """Tokens that go to each expert, shape (L, J)."""
        if len(self.steps) == 1:
            return self.steps[0].counts
        return np.sum([step.counts for step in self.steps], axis=0, dtype=np.int64)

    @cached_property
    def activated(self) -> list[tuple[int, ...]]:
        """Activated experts of every layer, ascending."""
        layers, experts = self.counts.nonzero()
        starts = np.searchsorted(layers, np.arange(len(self.counts) + 1)).tolist()
        ordered = experts.tolist()
        return [tuple(ordered[a:b]) for a, b in itertools.pairwise(starts)]

    @cached_property
    def probabilities(self) -> FloatArray:
        """Full softmax of every gate, shape (L, T, J). ValueError if the trace holds no logits."""
        return softmax(_joined("gate logits", [step.logits for step in self.steps], axis=1))

    @cached_property
    def embeddings(self) -> FloatArray:
        """Token embeddings, shape (T, h). ValueError if the trace holds none."""
        return _joined("embeddings", [step.embeddings for step in self.steps], axis=0)

    @cached_property
    def hidden_states(self) -> FloatArray:
        """Inputs of the gates, shape (L, T, h). ValueError if the trace holds none."""
        return _joined("hidden states", [step.hidden_states for step in self.steps], axis=1)


def joined(
    number: int, requests: Sequence[int], steps: Sequence[RoutedStep], contexts: Sequence[int]
) -> RoutedIteration:
    """Return the iteration in which `requests` take these steps together."""
    phase: Phase = "prefill" if steps[0].tokens > 1 or contexts[0] == steps[0].tokens else "decode"
    tokens = tuple(step.tokens for step in steps)
    iteration = Iteration(number, phase, tuple(requests), tokens)
    return RoutedIteration(iteration, tuple(steps), tuple(contexts))


def softmax(logits: FloatArray) -> FloatArray:
    """Return the softmax of gate logits over the experts (last axis), in float32."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _joined(what: str, parts: list[FloatArray | None], axis: int) -> FloatArray:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        raise ValueError(f"the trace holds no {what}, which this system needs")
    return present[0] if len(present) == 1 else np.concatenate(present, axis=axis)
