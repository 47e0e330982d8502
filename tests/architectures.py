"""Small members of the mixture-of-experts architectures of the installed transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as PICTURES,
)

from experiments.run.models import COMMON, random_model
from experiments.run.weights import SCALE_MODELS
from finemoe.offload.model import leave_text

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
SHORT = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    **{"d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 128},
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**LINEAR, "n_group": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note_vision_encoder": {
        **{"mlp_layer_types": ["dense"], "per_layer_config": {}},
        **{"adapter_in_dim": 16, "adapter_out_dim": 32},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 16, "adapter_out_dim": 32},
    "muse_spark_audio": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 3},
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2},
        **{"moe_intermediate_size": 16, "hidden_size_per_layer_input": 8},
        **{"vocab_size_per_layer_input": 128, "global_head_dim": 8},
        "pad_token_id": 0,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "inkling2_loop_text": SHORT,
    "inkling2_text": SHORT,
    "jamba": {**PERIODS, "expert_layer_period": 2, "expert_layer_offset": 0},
    "kimi_linear": LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention", "moe", "mlp", "moe"],
        "num_hidden_layers": 5,
    },
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": {
        **LINEAR,
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64},
        **{"ple_embed_dim": 8, "hc_lowrank": 4},
    },
    "zaya": {"num_experts_per_tok": 1},
    "ernie4_5_vl_moe_text": {
        **{"moe_intermediate_size": [16, 16], "head_dim": 16},
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
    },
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}},
    "glm5_next_text": {
        **{"index_kpool": 2, "indexer_types": ["full"] * 3, "qk_rope_head_dim": 0},
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "hy_v4_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "mistral4": {"head_dim": 16},
}
"""What kinds need beside it."""


PICTURE = {
    **dict.fromkeys(("depth", "num_hidden_layers", "n_layers"), 1),
    **dict.fromkeys(("hidden_size", "embed_dim"), 16),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), 2),
    **{"out_hidden_size": 32, "text_hidden_size": 32, "intermediate_size": 16, "head_dim": 8},
    **{"patch_size": 4, "deepstack_visual_indexes": [0], "projection_intermediate_size": 16},
    "sam_config": {"num_hidden_layers": 1, "global_attn_indexes": [0]},
    "encoder_config": {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 16},
}
"""Of an encoder of images or sound."""


def kinds() -> list[str]:
    """Return the models of text, or images and text, that use transformers' experts interface."""
    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    found = {one.parent.name for one in files if "use_experts_implementation" in one.read_text()}
    texts = {f"{name}_text" for name in found} & {*CAUSAL}
    return sorted(texts | found & {*CAUSAL, *PICTURES})


def small_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of a small member of an architecture."""
    default: Any = AutoConfig.for_model(kind)
    text = default.get_text_config()
    facts = _facts(text) | changes
    if text is default:
        return AutoConfig.for_model(kind, **facts)
    parts = {"text_config": {"model_type": text.model_type, **facts}}
    for name in ("vision_config", "audio_config"):
        if seen := getattr(default, name, None):
            same = {"num_hidden_layers"} if name == "audio_config" else set()
            small = {key: PICTURE[key] for key in {*PICTURE} & {*vars(seen)} - same}
            parts[name] = {"model_type": seen.model_type, **small, **OWN.get(seen.model_type, {})}
    return AutoConfig.for_model(kind, **parts)


def _facts(default: PreTrainedConfig) -> dict[str, Any]:
    own = {key for key, value in vars(default).items() if value is not None or "rank" not in key}
    facts = {key: value for key, value in SMALL.items() if key in own | {*COMMON}}
    if "kv_lora_rank" in facts:
        facts["num_key_value_heads"] = facts["num_attention_heads"]
    return facts | OWN.get(default.model_type, {})


def member(kind: str) -> Any:
    """Return a random small model whose gates are biased, with eager experts."""
    model = random_model(small_config(kind), torch.bfloat16, seed=0)
    leave_text(model)
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("score_correction_bias", "expert_bias", "expert_biases")):
            value.data.uniform_(0, 0.5, generator=generator)
    model.set_experts_implementation("eager")
    return model


def saved(kind: str, folder: Path) -> Path:
    """Save a random small member of an architecture with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    config = small_config(kind, vocab_size=len(tokenizer), max_position_embeddings=1024)
    random_model(config, torch.bfloat16, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
