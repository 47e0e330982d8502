"""Which tokens of a layer go to which expert, and how the experts' outputs come together.

Rows are taken in the order of transformers' eager experts, by rank of choice and then by token, and
outputs are added in the order of the experts' indices: both decide the last bits of a sum.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Dispatch(Protocol):
    """The routing of one layer in one iteration."""

    activated: list[int]
    """Indices of the experts that at least one token goes to, ascending."""

    def gather(self, index: int) -> Tensor:
        """Return the hidden states of the tokens that go to an expert, shape (n, h)."""

    def weigh(self, index: int, output: Tensor) -> Tensor:
        """Return an expert's output (n, h) times its routing weights."""

    def combine(self, outputs: dict[int, Tensor]) -> Tensor:
        """Return the sum of the weighted outputs for every token, shape (T, h)."""


def dispatch(hidden: Tensor, chosen: NDArray[Any], weights: Tensor) -> Dispatch:
    """Return the dispatch of tokens (T, h) to experts `chosen` (T, K, host) with weights (T, K)."""
    if len(chosen) == 1:
        return OneToken(hidden, chosen, weights)
    return ManyTokens(hidden, chosen, weights)


class OneToken:
    """A single token: no rows to gather, no index to send to the device."""

    def __init__(self, hidden: Tensor, chosen: NDArray[Any], weights: Tensor) -> None:
        ranks = chosen[0].tolist()
        self.activated = sorted(ranks)
        self._rank = {index: rank for rank, index in enumerate(ranks)}
        self._hidden = hidden
        self._weights = weights

    def gather(self, index: int) -> Tensor:
        return self._hidden

    def weigh(self, index: int, output: Tensor) -> Tensor:
        rank = self._rank[index]
        return (output * self._weights[:, rank : rank + 1]).to(self._hidden.dtype)

    def combine(self, outputs: dict[int, Tensor]) -> Tensor:
        total = torch.zeros_like(self._hidden)
        for index in self.activated:
            total += outputs[index]
        return total


class ManyTokens:
    """Several tokens: rows and ranks of all experts go to the device in one copy."""

    def __init__(self, hidden: Tensor, chosen: NDArray[Any], weights: Tensor) -> None:
        experts = chosen.T.ravel()
        order = experts.argsort(kind="stable")
        indices, starts = np.unique(experts[order], return_index=True)
        ranks_and_rows = np.stack(np.divmod(order, len(chosen)))
        places = torch.from_numpy(ranks_and_rows).to(hidden.device)
        stops = [*starts[1:].tolist(), len(order)]
        self.activated: list[int] = indices.tolist()
        self._places = {
            index: places[:, start:stop]
            for index, start, stop in zip(self.activated, starts.tolist(), stops, strict=True)
        }
        self._hidden = hidden
        self._weights = weights

    def gather(self, index: int) -> Tensor:
        return self._hidden[self._places[index][1]]

    def weigh(self, index: int, output: Tensor) -> Tensor:
        ranks, rows = self._places[index]
        return (output * self._weights[rows, ranks, None]).to(self._hidden.dtype)

    def combine(self, outputs: dict[int, Tensor]) -> Tensor:
        total = torch.zeros_like(self._hidden)
        for index in self.activated:
            total.index_add_(0, self._places[index][1], outputs[index])
        return total
