"""A transformers model whose experts have been taken out, and where its gates and layers are.

Works for every architecture whose experts go through transformers' experts interface; gates are
found by the class that the model itself names for its router logits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finemoe.offload.device import Dispatch, ExpertKernel, HostStore
from finemoe.offload.gates import rank_as_chosen
from finemoe.offload.policy import ModelShape

if TYPE_CHECKING:
    # Importing it takes seconds, which a replay does not need.
    from transformers import PreTrainedModel

IMPLEMENTATION = "finemoe"
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")
"""What configs call the experts of a token."""


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return module.offload_forward(hidden, index, weights)


def grouped_mm(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return what transformers' grouped kernels make of a module that has its experts' parameters.

    Tokens (T, h), their experts (T, K) and routing weights (T, K) give (T, h). A single token goes
    by `batched_mm`, as in the decoding stage of `generate`: it copies the K experts together, and
    is launched sooner.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    kernel = ALL_EXPERTS_FUNCTIONS["batched_mm" if len(hidden) == 1 else "grouped_mm"]
    output: Tensor = kernel(module, hidden, index, weights)
    return output


def grouped_mm_waits(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the host has to wait for grouped kernels on a device.

    Not in torch 2.13 for bfloat16 on compute capability 9 and 10; elsewhere it reads the groups'
    sizes and multiplies one by one (ATen/native/cuda/GroupedBlas.cpp and GroupMM.cu).
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return True
    return torch.cuda.get_device_capability(device)[0] not in (9, 10)


@dataclass(frozen=True)
class OffloadedModel:
    """Dense parts on the main device, experts in the host store."""

    model: "PreTrainedModel"
    store: HostStore
    shape: ModelShape
    gates: tuple[nn.Module, ...]
    experts: tuple[nn.Module, ...]
    kernels: tuple[ExpertKernel, ...]
    logits_index: int  # which of the router's outputs holds the logits
    sums: torch.dtype | None  # in which experts' outputs are added, if not in that of the tokens
    as_eager: bool
    """Whether a layer's own eager experts gave the same, bit for bit, when the model was loaded."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dense_bytes(self) -> int:
        """Bytes of what stays resident and is not counted against the budget."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @classmethod
    def from_model(cls, model: "PreTrainedModel", device: torch.device) -> Self:
        """Take the experts out of a model on the CPU and move the rest to `device`."""
        shape, experts = shape_of(model), find_moe_layers(model)[1]
        tried = _tried(model, shape, dict(experts[0].named_parameters(recurse=False)))
        store = HostStore.take_from(experts, pin=device.type == "cuda")
        dense: Any = model
        return cls._assemble(dense.to(device), store, shape, *tried)

    @classmethod
    def from_meta(cls, model: "PreTrainedModel", device: torch.device, seed: int) -> Self:
        """Give a meta-device model random weights; all its experts share one host block."""
        shape, experts = shape_of(model), find_moe_layers(model)[1]
        std = float(getattr(model.config, "initializer_range", 0.02))
        store = HostStore.shared(experts, shape.experts, device.type == "cuda", std, seed)
        block = store.layout.views(store.blocks[0]).items()
        tried = _tried(model, shape, {n: v.expand(shape.experts, *v.shape) for n, v in block})
        for module in experts:
            module._is_hf_initialized = True  # type: ignore[assignment]
        model.to_empty(device=device)
        torch.manual_seed(seed)
        model.init_weights()
        return cls._assemble(model, store, shape, *tried)

    @classmethod
    def _assemble(cls, model: Any, store: HostStore, shape: ModelShape, *tried: Any) -> Self:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
        model.eval()
        model.set_experts_implementation(IMPLEMENTATION)
        gates, experts, logits_index = find_moe_layers(model)
        with torch.inference_mode():
            hidden = torch.zeros(1, 2, shape.hidden_size, dtype=model.dtype, device=model.device)
            rank_as_chosen(gates, logits_index, shape.experts, hidden)
        kernels = tuple(map(ExpertKernel, experts))
        layers = tuple(gates), tuple(experts), kernels
        return cls(model, store, shape, *layers, logits_index, *tried)


@torch.inference_mode()
def _tried(
    model: Any, shape: ModelShape, parameters: dict[str, Tensor]
) -> tuple[torch.dtype | None, bool]:
    """Return in which dtype outputs are added as the first layer's own eager experts do, and
    whether they agree bit for bit, by trying both on four tokens."""
    model.set_experts_implementation("eager")
    module: Any = find_moe_layers(model)[1][0]
    down = parameters["down_proj"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, down.shape[2 if module.is_transposed else 1], generator=generator)
    hidden = hidden.to(down.dtype)
    chosen = torch.arange(shape.top_k).expand(4, -1)
    weights = torch.rand(4, shape.top_k, generator=generator)
    eager = functional_call(module, parameters, (hidden, chosen, weights))
    kernel = ExpertKernel(module)
    for sums in (None, torch.float32):
        routing = Dispatch(hidden, chosen, chosen.numpy(), weights, sums)
        outputs = {
            i: kernel(routing.gather(i, hidden.device), {n: p[i] for n, p in parameters.items()})
            for i in routing.activated
        }
        if torch.equal(routing.combine(outputs), eager):
            return sums, True
    return None, False


def class_for(config: Any) -> Any:
    """Return the transformers class that serves text for a config: of a language model, or else of
    a model of images and text."""
    import transformers

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def leave_text(model: "PreTrainedModel") -> None:
    """Take the encoders of images and sound out of a model, which text does not reach.

    Raises ValueError if they have experts, as in models whose encoder also reads text.
    """
    for modality in ("image", "audio"):
        encoder: Any = model.get_encoder(modality=modality)
        for name, module in [*model.named_modules()]:
            if module is not encoder or module is model:
                continue
            if any(map(_holds_experts, encoder.modules())):
                raise ValueError(f"{type(model).__name__} has experts in {name}")
            model.set_submodule(name, nn.Identity())


def find_moe_layers(model: "PreTrainedModel") -> tuple[list[nn.Module], list[nn.Module], int]:
    """Return gates, experts modules, and which output of a gate holds logits, or ValueError."""
    modules = list(model.modules())
    experts = [*filter(_holds_experts, modules)]
    recorded = [getattr(m, "_can_record_outputs", None) or {} for m in modules]
    recorder: Any = next((r["router_logits"] for r in recorded if "router_logits" in r), None)
    if not experts or recorder is None:
        raise ValueError(f"{type(model).__name__} has no experts behind the experts interface")
    gates = [m for m in modules if isinstance(m, recorder.target_class)]
    if len(gates) != len(experts):
        raise ValueError(f"{len(gates)} gates for {len(experts)} MoE layers")
    return gates, experts, recorder.index


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def shape_of(model: "PreTrainedModel") -> ModelShape:
    """Return the shape of a model that has its experts; ValueError if a token needs more."""
    config = model.config.get_text_config()
    gates, experts, _ = find_moe_layers(model)
    count, top_k = next(experts[0].parameters(recurse=False)).shape[0], _top_k(gates, config)
    if not 1 <= top_k <= count:
        raise ValueError(f"tokens go to {top_k} of {count} experts")
    return ModelShape(len(experts), count, top_k, config.hidden_size)


def _top_k(gates: list[nn.Module], config: Any) -> int:
    """Return to how many experts a token goes, by the gates or else the config, or ValueError."""
    told = next((k for name in TOP_K if (k := getattr(config, name, None)) is not None), 0)
    found: set[Any] = {getattr(gate, "top_k", None) for gate in gates}
    if None in found:
        found = set(told) if isinstance(told, list) else {told}
    if len(found) != 1:
        raise ValueError(f"the layers differ in how many experts a token goes to: {found}")
    return int(found.pop())
