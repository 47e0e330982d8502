"""Small members of the mixture-of-experts architectures of the installed transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from experiments.run.small_models import COMMON, random_model
from experiments.run.weights import SCALE_MODELS

SMALL: dict[str, Any] = {
    **COMMON,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **{"n_group": 2, "topk_group": 1, "sliding_window": 6},
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_head_dim": 8, "mamba_d_state": 4, "mamba_dt_rank": 4, "mamba_n_heads": 8},
    **{"mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_num_heads": 8},
    **{"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
}
"""By key; a config gets those that its kind has."""

LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {**PERIODS, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
}
"""What kinds need beside it."""


def small_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of a small member of an architecture."""
    default = AutoConfig.for_model(kind)
    facts = {key: value for key, value in SMALL.items() if key in COMMON or _has(default, key)}
    if "kv_lora_rank" in facts:
        facts["num_key_value_heads"] = facts["num_attention_heads"]
    return AutoConfig.for_model(kind, **facts | OWN.get(kind, {}) | changes)


def _has(config: PreTrainedConfig, key: str) -> bool:
    """Tell whether a config has a value for a key; what may differ by layer raises."""
    try:
        return getattr(config, key, None) is not None
    except AttributeError:
        return True


def saved(kind: str, folder: Path) -> Path:
    """Save a random small member of an architecture with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    config = small_config(kind, vocab_size=len(tokenizer), max_position_embeddings=1024)
    random_model(config, torch.bfloat16, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
