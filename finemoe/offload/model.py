"""A transformers model whose experts have been taken out, and where its gates and layers are.

Works for every architecture whose experts go through transformers' experts interface; gates are
found by the class that the model itself names for its router logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finemoe.offload.experts import ExpertKernel, HostStore
from finemoe.offload.policy import ModelShape

if TYPE_CHECKING:
    # Importing it takes seconds, which a replay does not need.
    from transformers import PreTrainedModel

IMPLEMENTATION = "finemoe"

LayerForward = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dispatch(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    forward: LayerForward = module.offload_forward
    return forward(hidden, index, weights)


@dataclass(frozen=True)
class OffloadedModel:
    """Dense parts on the main device, experts in the host store."""

    model: PreTrainedModel
    store: HostStore
    shape: ModelShape
    gates: tuple[nn.Module, ...]
    experts: tuple[nn.Module, ...]
    kernels: tuple[ExpertKernel, ...]
    logits_index: int
    """Which of the router's outputs holds the logits."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dense_bytes(self) -> int:
        """Bytes of what stays resident and is not counted against the budget."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @classmethod
    def from_model(cls, model: PreTrainedModel, device: torch.device) -> OffloadedModel:
        """Take the experts out of a model on the CPU and move the rest to `device`."""
        gates, experts, logits_index = find_moe_layers(model)
        shape = shape_of(model)
        store = HostStore.take_from(experts, pin=device.type == "cuda")
        dense: Any = model
        return cls._assemble(dense.to(device), store, shape, gates, experts, logits_index)

    @classmethod
    def from_meta(cls, model: PreTrainedModel, device: torch.device, seed: int) -> OffloadedModel:
        """Give a meta-device model random weights; all its experts share one host block."""
        gates, experts, logits_index = find_moe_layers(model)
        shape = shape_of(model)
        std = float(getattr(model.config, "initializer_range", 0.02))
        pin = device.type == "cuda"
        store = HostStore.shared(experts, shape.experts, pin, std, seed)
        for module in experts:
            module._is_hf_initialized = True  # type: ignore[assignment]
        model.to_empty(device=device)
        torch.manual_seed(seed)
        model.init_weights()
        return cls._assemble(model, store, shape, gates, experts, logits_index)

    @classmethod
    def _assemble(
        cls,
        model: Any,
        store: HostStore,
        shape: ModelShape,
        gates: list[nn.Module],
        experts: list[nn.Module],
        logits_index: int,
    ) -> OffloadedModel:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)
        model.eval()
        model.set_experts_implementation(IMPLEMENTATION)
        kernels = tuple(ExpertKernel(module) for module in experts)
        return cls(model, store, shape, tuple(gates), tuple(experts), kernels, logits_index)


def find_moe_layers(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module], int]:
    """Return gates, experts modules (layer order) and the place of the logits among gate outputs.

    Raises ValueError if the model has no experts that go through the experts interface.
    """
    experts = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]
    recorder = _router_recorder(model)
    if not experts or recorder is None:
        raise ValueError(f"{type(model).__name__} has no experts behind the experts interface")
    gates = [m for m in model.modules() if isinstance(m, recorder.target_class)]
    if len(gates) != len(experts):
        raise ValueError(f"{len(gates)} gates for {len(experts)} MoE layers")
    return gates, experts, recorder.index


def _router_recorder(model: PreTrainedModel) -> Any:
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        if "router_logits" in recorded:
            return recorded["router_logits"]
    return None


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the routing shape of a model that has its experts.

    Raises ValueError if it has none, or fewer than a token shall have.
    """
    config = model.config.get_text_config()
    experts = find_moe_layers(model)[1]
    count = next(experts[0].parameters(recurse=False)).shape[0]
    if not 1 <= config.num_experts_per_tok <= count:
        raise ValueError(f"num_experts_per_tok={config.num_experts_per_tok} of {count} experts")
    return ModelShape(len(experts), count, config.num_experts_per_tok, config.hidden_size)
