"""Routing from a trace in a live model: real copies and kernels, but given choices of experts."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import FloatArray, Iteration
from finemoe.offload.routed import RoutedStep


class GateStep(NamedTuple):
    """What the gates of all L layers say of one request's T tokens, ready to be handed out."""

    logits: Tensor  # shape (L, T, J), float32
    chosen: Tensor  # indices of experts by descending logit, shape (L, T, K)
    weights: Tensor  # softmax of the chosen logits, shape (L, T, K), float32

    @classmethod
    def of(cls, step: RoutedStep, top_k: int) -> Self:
        """Raises ValueError if the step has no logits or its counts do not follow from them."""
        if step.logits is None:
            raise ValueError("the trace holds no gate logits; record them too")
        layers = zip(step.logits, step.counts, strict=True)
        chosen = torch.from_numpy(np.stack([choices(*layer, top_k) for layer in layers]))
        logits = torch.from_numpy(np.array(step.logits))
        return cls(logits, chosen, logits.gather(-1, chosen).softmax(-1))


def choices(logits: FloatArray, counts: NDArray[np.integer], top_k: int) -> NDArray[np.int64]:
    """Return each token's K experts of highest logit, (T, K), as often each as `counts` says.

    Where logits (T, J) tie for the last rank, `counts` (J,) decides. Raises ValueError if the
    choice was another one than of the highest logits.
    """
    index: NDArray[np.int64] = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    due = counts.astype(np.int64)
    if not _adds_up(index, due):
        _settle_ties(index, logits, due)
        if not _adds_up(index, due):
            raise ValueError("the trace's choices are not those of the highest logits")
    return index


def _adds_up(index: NDArray[np.int64], due: NDArray[np.int64]) -> bool:
    return np.array_equal(np.bincount(index.ravel(), minlength=len(due)), due)


def _settle_ties(index: NDArray[np.int64], logits: FloatArray, due: NDArray[np.int64]) -> None:
    """Let experts that tie for a token's last ranks take turns as often as is due, in place."""
    top_k = index.shape[1]
    last = np.take_along_axis(logits, index[:, -1:], axis=1)
    above, level = logits > last, logits == last
    left = due - above.sum(axis=0)
    open_ranks = top_k - above.sum(axis=1)
    forced = level.sum(axis=1) == open_ranks
    left -= level[forced].sum(axis=0)
    for token in np.flatnonzero(~forced):
        tied = np.flatnonzero(level[token])
        picked = tied[np.argsort(-left[tied], kind="stable")[: open_ranks[token]]]
        index[token, top_k - open_ranks[token] :] = picked
        left[picked] -= 1


class TracedGates:
    """Overrules a model's gates between enter and exit, whichever runtime drives it.

    Enter it before the runtime: hooks run in the order of their registration, so that the runtime
    and its policy see the trace's logits. The gates themselves still run; what is added is one copy
    an iteration of logits and choices to the model's device. Call `begin` before every pass.
    """

    def __init__(self, model: OffloadedModel) -> None:
        self.model = model
        self._hooks = ExitStack()
        self._now: GateStep | None = None

    def __enter__(self) -> Self:
        enter = self._hooks.enter_context
        layers = zip(self.model.gates, self.model.experts, strict=True)
        for layer, (gate, experts) in enumerate(layers):
            enter(gate.register_forward_hook(partial(self._on_gate, layer)))
            enter(experts.register_forward_pre_hook(partial(self._on_experts, layer)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def begin(self, iteration: Iteration, steps: Sequence[GateStep]) -> None:
        """Take the steps of the iteration's requests, in their order; ValueError if they misfit."""
        lengths = tuple(step.logits.shape[1] for step in steps)
        if lengths != iteration.tokens:
            served = iteration.tokens
            raise ValueError(f"the trace routes {lengths} tokens where {served} are served")
        parts = (torch.cat(part, 1).to(self.model.device) for part in zip(*steps, strict=True))
        self._now = GateStep(*parts)

    def _on_gate(self, layer: int, _module: Any, _inputs: Any, output: Any) -> Any:
        assert self._now is not None
        outputs, logits = list(output), self.model.logits_index
        own: Tensor = outputs[logits]
        outputs[logits] = self._now.logits[layer].to(own.dtype).reshape(own.shape)
        return tuple(outputs)

    def _on_experts(self, layer: int, _module: Any, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen, weights = inputs
        now = self._now
        assert now is not None
        return hidden, now.chosen[layer].to(chosen.dtype), now.weights[layer].to(weights.dtype)
