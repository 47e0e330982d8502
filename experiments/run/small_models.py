"""Small random members of the model families that the engine serves bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from finemoe.offload.model import class_for

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": None,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "qwen2_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "phimoe": {"intermediate_size": 48, "num_local_experts": 6, "head_dim": 8},
    "olmoe": {"intermediate_size": 48, "num_experts": 6},
    "deepseek_v2": {
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 8),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {"intermediate_size": 16, "num_local_experts": 4, "head_dim": 8},
}

WEIGHT_STD = 0.2  # wide enough that a small model's routing depends on its input


def small_model(family: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a family, the same for the same seed, with eager experts."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model: PreTrainedModel = random_model(config, dtype, seed)
    model.set_experts_implementation("eager")
    return model


def random_model(config: Any, dtype: torch.dtype, seed: int) -> Any:
    """Return a model of a config with random weights, in eval mode."""
    torch.manual_seed(seed)
    model = class_for(config).from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=WEIGHT_STD, generator=generator)
    return model.eval()
