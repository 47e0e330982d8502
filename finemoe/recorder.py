"""Record what a model routes while it serves, by hooks that change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import FloatArray, GateWeights, Iteration
from finemoe.offload.routed import RoutedStep
from finemoe.trace import Content, DType, TracedRequest

EVERYTHING: tuple[Content, ...] = ("logits", "embeddings", "hidden_states")


class Recorder:
    """Listens to a model between enter and exit, whichever runtime drives it.

    Call `begin` before every forward pass and `finish` when a request is served. Until then its
    steps are kept in memory, as float32, which holds 16-bit values exactly.
    """

    def __init__(self, model: OffloadedModel, contents: tuple[Content, ...] = EVERYTHING) -> None:
        self.model = model
        self.contents = contents
        self._hooks: list[Any] = []
        self._dtypes: set[torch.dtype] = set()
        self._steps: dict[int, list[RoutedStep]] = {}
        self._iteration: Iteration | None = None
        self._embeddings: FloatArray | None = None
        self._logits: list[FloatArray] = []
        self._hidden_states: list[FloatArray] = []
        self._chosen: list[Any] = []

    @property
    def dtype(self) -> DType:
        """The widest dtype among the arrays seen so far: what a trace of them must be stored in."""
        if len(self._dtypes) == 1:
            only = str(next(iter(self._dtypes))).removeprefix("torch.")
            if only in ("bfloat16", "float16"):
                return only  # type: ignore[return-value]
        return "float32"

    def __enter__(self) -> Recorder:
        try:
            embedding = self.model.model.get_input_embeddings()
            self._hooks.append(embedding.register_forward_hook(self._on_embeddings))
            for gate, experts in zip(self.model.gates, self.model.experts, strict=True):
                self._hooks.append(gate.register_forward_hook(self._on_logits))
                self._hooks.append(experts.register_forward_pre_hook(self._on_experts))
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self, iteration: Iteration) -> None:
        """Take note of whose rows the next forward pass holds; one that broke off is forgotten."""
        self._iteration = iteration
        self._embeddings = None
        self._logits, self._hidden_states, self._chosen = [], [], []

    def finish(
        self, request: int, prompt: tuple[int, ...], output: tuple[int, ...]
    ) -> TracedRequest:
        """Hand out what a request routed and forget it; KeyError if it never ran."""
        return TracedRequest(request, prompt, output, tuple(self._steps.pop(request)))

    def _on_embeddings(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        if "embeddings" in self.contents:
            self._embeddings = self._host(output)

    def _on_logits(self, _module: Any, _inputs: Any, output: Any) -> None:
        if "logits" in self.contents:
            self._logits.append(self._host(output[self.model.logits_index]))

    def _on_experts(self, _module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, index, _ = inputs
        if "hidden_states" in self.contents:
            self._hidden_states.append(self._host(hidden))
        self._chosen.append(index.detach().cpu().numpy().copy())
        if len(self._chosen) == self.model.shape.layers:
            self._close()

    def _close(self) -> None:
        """Share the arrays of a whole iteration out among its requests."""
        assert self._iteration is not None
        chosen = np.stack(self._chosen)
        logits = np.stack(self._logits) if self._logits else None
        states = np.stack(self._hidden_states) if self._hidden_states else None
        for request, rows in zip(self._iteration.requests, self._iteration.rows(), strict=True):
            step = RoutedStep(
                rows.stop - rows.start,
                self._counts(chosen[:, rows]),
                None if logits is None else logits[:, rows],
                None if self._embeddings is None else self._embeddings[rows],
                None if states is None else states[:, rows],
            )
            self._steps.setdefault(request, []).append(step)

    def _counts(self, chosen: Any) -> Any:
        """Return how many tokens chose each expert, (L, J), from choices (L, T, K)."""
        layers, experts = self.model.shape.layers, self.model.shape.experts
        flat = (chosen + experts * np.arange(layers)[:, None, None]).ravel()
        counts = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
        return counts.astype(np.int32)

    def _host(self, tensor: Tensor) -> FloatArray:
        self._dtypes.add(tensor.dtype)
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        # A copy even on the CPU: the model may reuse the memory.
        return rows.to("cpu", torch.float32, copy=True).numpy()


def gate_weights(model: OffloadedModel) -> GateWeights:
    """Return the model's gates on the host; ValueError if they are no linear maps of (J, h)."""
    shape = model.shape
    weights = [_parameter(gate, "weight") for gate in model.gates]
    due = (shape.experts, shape.hidden_size)
    if any(weight is None or weight.shape != due for weight in weights):
        raise ValueError(f"{type(model.gates[0]).__name__} is no linear gate; record without gates")
    biases = [_parameter(gate, "bias") for gate in model.gates]
    bias = (
        None if any(b is None for b in biases) else np.stack([b for b in biases if b is not None])
    )
    return GateWeights(np.stack([weight for weight in weights if weight is not None]), bias)


def _parameter(gate: nn.Module, name: str) -> FloatArray | None:
    value = getattr(gate, name, None)
    return None if value is None else value.detach().float().cpu().numpy().copy()
