"""Words for tests: states of an expert, prefetch requests as dictionaries, routing of one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

from finemoe.costs import Line, LinearCosts
from finemoe.offload.cache import ExpertCache
from finemoe.offload.policy import FloatArray, Gate, Iteration, ModelShape, Priorities
from finemoe.offload.routed import RoutedIteration, RoutedStep, joined

DECODE = Iteration(0, "decode", (0,), (1,))


def decode(number: int, *requests: int) -> Iteration:
    return Iteration(number, "decode", requests, (1,) * len(requests))


def gate(layer: int, *rows: object, hidden: Any = None, activated: tuple[int, ...] = (0,)) -> Gate:
    """Return a gate that says these probabilities, of tokens with these hidden states."""
    states = None if hidden is None else np.array(hidden, dtype=np.float32)
    return Gate(layer, array(*rows), activated, states)


@dataclass(frozen=True)
class HostCosts(LinearCosts):
    """Lines, and one for the host."""

    host_line: Line

    def host(self, tokens: int) -> float:
        return self.host_line.at(tokens)


class State(Enum):
    """Whether an expert is on its device, on its way, or neither."""

    ABSENT = auto()
    LOADING = auto()
    RESIDENT = auto()


def state(cache: ExpertCache, flat: int) -> State:
    if cache.is_resident(flat):
        return State.RESIDENT
    return State.ABSENT if cache.absent[flat] else State.LOADING


def asking(shape: ModelShape, requests: Mapping[tuple[int, int], float]) -> Priorities:
    """Return the prefetch requests for experts (layer, index) with these priorities."""
    priorities = np.zeros((shape.layers, shape.experts))
    for expert, priority in requests.items():
        priorities[expert] = priority
    return priorities


def asked(priorities: Priorities | None) -> dict[tuple[int, int], float]:
    """Return which experts (layer, index) are requested, and their priorities."""
    if priorities is None:
        return {}
    found = np.argwhere(priorities > 0).tolist()
    return {(layer, index): float(priorities[layer, index]) for layer, index in found}


def array(*rows: object) -> FloatArray:
    return np.array(rows, dtype=np.float32)


def routed(
    shape: ModelShape, number: int, activated: Sequence[Sequence[int]], tokens: int = 1
) -> RoutedIteration:
    """Return an iteration of one request whose layers activate these experts."""
    counts = np.zeros((shape.layers, shape.experts), dtype=np.int64)
    for layer, indices in enumerate(activated):
        counts[layer, list(indices)] = 1
    logits = np.zeros((shape.layers, tokens, shape.experts), dtype=np.float32)
    embeddings = np.zeros((tokens, shape.hidden_size), dtype=np.float32)
    hidden = np.zeros((shape.layers, tokens, shape.hidden_size), dtype=np.float32)
    step = RoutedStep(tokens, counts, logits, embeddings, hidden)
    return joined(number, (0,), (step,), (5,))
