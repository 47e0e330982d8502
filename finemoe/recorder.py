"""Record what a model routes while it serves, by hooks that change nothing."""

from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from finemoe.offload.gates import is_plain
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import FloatArray, GateWeights, Iteration
from finemoe.offload.routed import RoutedStep
from finemoe.trace import CONTENTS, Content, DType, TracedRequest


class Recorder:
    """Listens to a model between enter and exit, whichever runtime drives it.

    Call `begin` before every forward pass and `finish` when a request is served. Until then its
    steps are kept in memory, as float32, which holds 16-bit values exactly.
    """

    def __init__(self, model: OffloadedModel) -> None:
        self.model = model
        self._hooks = ExitStack()
        self._dtypes: set[torch.dtype] = set()
        self._steps: dict[int, list[RoutedStep]] = {}
        self._iteration: Iteration | None = None
        self._arrays: dict[Content, list[FloatArray]] = {}
        """Of the iteration: the embeddings, and what every layer has computed so far."""
        self._choices: list[Any] = []

    @property
    def dtype(self) -> DType:
        """The widest dtype among the arrays seen so far: what a trace of them must be stored in."""
        if self._dtypes == {torch.bfloat16}:
            return "bfloat16"
        return "float16" if self._dtypes == {torch.float16} else "float32"

    def __enter__(self) -> Self:
        enter = self._hooks.enter_context
        embedding = self.model.model.get_input_embeddings()
        enter(embedding.register_forward_hook(self._on_embeddings))
        for gate, experts in zip(self.model.gates, self.model.experts, strict=True):
            enter(gate.register_forward_hook(self._on_gate))
            enter(experts.register_forward_pre_hook(self._on_experts))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def begin(self, iteration: Iteration) -> None:
        """Take note of whose rows the next forward pass holds; one that broke off is forgotten."""
        self._iteration = iteration
        self._arrays = {name: [] for name in CONTENTS}
        self._choices = []

    def finish(
        self, request: int, prompt: tuple[int, ...], output: tuple[int, ...]
    ) -> TracedRequest:
        """Hand out what a request routed and forget it; KeyError if it never ran."""
        return TracedRequest(request, prompt, output, tuple(self._steps.pop(request)))

    def _on_embeddings(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._keep("embeddings", output)

    def _on_gate(self, _module: Any, inputs: Any, output: Any) -> None:
        self._keep("hidden_states", inputs[0])
        self._keep("logits", output[self.model.logits_index])

    def _on_experts(self, _module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        index = inputs[1]
        self._choices.append(index.detach().cpu().numpy().copy())
        if len(self._choices) == self.model.shape.layers:
            self._share_out()

    def _keep(self, name: Content, tensor: Tensor) -> None:
        self._dtypes.add(tensor.dtype)
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        # A copy even on the CPU: the model may reuse the memory.
        self._arrays[name].append(rows.to("cpu", torch.float32, copy=True).numpy())

    def _share_out(self) -> None:
        """Give each request of a whole iteration its rows."""
        assert self._iteration is not None
        experts = self.model.shape.experts
        logits, embeddings, hidden = (np.stack(self._arrays[name]) for name in CONTENTS)
        for request, rows in zip(self._iteration.requests, self._iteration.rows(), strict=True):
            # Tokens that go to each expert, (L, J), by choices (T, K) of each layer.
            chosen = (layer[rows].ravel() for layer in self._choices)
            counts = np.stack([np.bincount(one, minlength=experts) for one in chosen])
            arrays = logits[:, rows], embeddings[0, rows], hidden[:, rows]
            step = RoutedStep(rows.stop - rows.start, counts.astype(np.int32), *arrays)
            self._steps.setdefault(request, []).append(step)


def gate_weights(model: OffloadedModel) -> GateWeights:
    """Return the model's gates on the host; ValueError if they are of another kind."""
    shape, first = model.shape, model.gates[0]
    weight = _stacked(model, "weight", (shape.experts, shape.hidden_size))
    correction = _stacked(model, "e_score_correction_bias", (shape.experts,))
    if weight is not None and all(map(is_plain, model.gates)):
        return GateWeights(weight, _stacked(model, "bias", (shape.experts,)))
    if weight is not None and correction is not None:
        groups = (getattr(first, name, 1) for name in ("num_group", "topk_group"))
        weights = GateWeights(weight, None, correction, (next(groups), next(groups)))
        if _rank_alike(model, weights):
            return weights
    raise ValueError(
        f"{type(first).__name__} chooses by more than a linear map and corrected groups"
    )


@torch.inference_mode()
def _rank_alike(model: OffloadedModel, weights: GateWeights) -> bool:
    """Tell whether gates say of random tokens what these weights make of them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, model.shape.hidden_size, generator=generator).to(model.model.dtype)
    rows = hidden[0].float().numpy()
    for layer, gate in enumerate(model.gates):
        told = gate(hidden.to(model.device))[model.logits_index].float().cpu().numpy()
        if not np.allclose(told.reshape(8, -1), weights.logits(layer, rows), atol=1e-3):
            return False
    return True


def _stacked(model: OffloadedModel, name: str, shape: tuple[int, ...]) -> FloatArray | None:
    """Return a parameter of all gates, or None if not all have one of this shape."""
    values: list[Any] = [getattr(gate, name, None) for gate in model.gates]
    if any(value is None or value.shape != shape for value in values):
        return None
    return np.stack([value.detach().float().cpu().numpy() for value in values])
