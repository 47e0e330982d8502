"""Models: those that configs name, with their experts out of the way; their facts; small ones."""

import gc
import math
import re
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from experiments import CONF
from experiments.errors import UserError
from experiments.run.weights import NAMED, SCALE_MODELS, hub_access, is_hub, loading, source_of
from finemoe.offload.device import BlockLayout
from finemoe.offload.model import OffloadedModel, class_for, find_moe_layers, leave_text, shape_of

# Kinds of layers that keep something of every token.
GROWING = ("full_attention", "sliding_attention", "indexed_attention", "hybrid", "hybrid_sliding")
PREFETCH_DISTANCE = 3  # of a model that nobody measured: Mixtral's (section 6.1)
FACTS = (  # what tells models apart: a scale model has the first four
    *("scale.config.model_type", "layers", "experts", "top_k"),
    *("hidden_size", "expert_intermediate_size"),
)
DEQUANTISED = ("fp8", "mxfp4")  # ways to quantise that transformers can undo
SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LOADING_SHARE = 1.15  # of memory over what it must take: 1.0 for large tensors
DESCRIPTION = "a {} of {} x {} experts, top-{}, with hidden size {} and expert size {}"


@dataclass(frozen=True)
class LoadedModel:
    """An offloaded model, its tokenizer, and what one of its full-size experts weighs."""

    offloaded: OffloadedModel
    tokenizer: Any
    full_expert_bytes: int
    cast: str | None = None  # what most weights were cast from and to, if they were

    @property
    def positions(self) -> int | None:
        """For how many tokens the model was made; None if it does not say."""
        config = self.offloaded.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def check_weights(cfg: DictConfig) -> None:
    """Raise UserError if config.json, as far as it is here, is of another model or missing."""
    if folder := _folder(source_of(cfg.model, str(cfg.weights))):
        outline_of(cfg.model, str(cfg.weights), str(folder))


def load_model(cfg: DictConfig, weights: str, device: torch.device, seed: int) -> LoadedModel:
    """Load `weights` of the model of `cfg`; UserError if they are missing, damaged or another's."""
    if weights == "dummy":
        borrowed = cfg.dummy_tokenizer and str(SCALE_MODELS / cfg.dummy_tokenizer)
        outline = outline_of(cfg, weights, None if borrowed else source_of(cfg, cfg.hub_id))
        with loading(f"weights={weights}", "choose another model"):
            tokenizer: Any = _tokenizer(borrowed or source_of(cfg, cfg.hub_id), outline)
            offloaded = OffloadedModel.from_meta(outline, device, seed)
    else:
        model, tokenizer = load_plain(cfg, weights)
        with loading(f"weights={weights}", "choose another model"):
            offloaded = OffloadedModel.from_model(model, device)
    full = full_expert_bytes(cfg, weights, offloaded.store.layout.nbytes)
    held = offloaded.dense_bytes + offloaded.shape.size * offloaded.store.layout.nbytes
    cast = cast_of(cfg, weights, offloaded.model.dtype, held)
    return LoadedModel(offloaded, tokenizer, full, cast)


def load_plain(cfg: DictConfig, weights: str) -> tuple[Any, Any]:
    """Return the whole model on the CPU and its tokenizer; UserError as in `load_model`.

    The host must have room for the peak: when the first MoE layer has been copied into blocks, or
    by DeepSpeed, and not been freed yet, that is all weights and that layer twice. Files are
    mapped, and their pages given back.
    """
    if weights == "dummy":
        raise UserError("weights=dummy exist one expert at a time; use scale, hub or a folder")
    source = source_of(cfg, weights)
    with hub_access() if is_hub(weights) else nullcontext():
        outline = outline_of(cfg, weights, source)
        tokenizer = _tokenizer(source, outline)
        modules = find_moe_layers(outline)[1]
        layers = [sum(one.nbytes for one in module.parameters(recurse=False)) for module in modules]
        whole = sum(parameter.nbytes for parameter in outline.parameters())
        needed, free = LOADING_SHARE * (whole + max(layers)), available_bytes()
        if needed > free:
            cause = f"loading weights={weights} of {cfg.name} takes {needed / 1e9:.1f} GB of host"
            parts = f"memory ({sum(layers) / 1e9:.1f} GB for experts stay)"
            remedy = "choose a smaller model or a machine with more memory"
            raise UserError(f"{cause} {parts}, and {free / 1e9:.1f} GB are available; {remedy}")
        return _whole(source, outline.dtype), tokenizer


def full_expert_bytes(cfg: DictConfig, weights: str, stored: int) -> int:
    """Return the bytes of one full-size expert of a model whose own take `stored`."""
    return 3 * cfg.hidden_size * cfg.expert_intermediate_size * 2 if weights == "scale" else stored


def outline_of(cfg: DictConfig, weights: str, source: str | None) -> Any:
    """Return the model on the meta device; raise UserError unless it is the one of `cfg`."""
    import transformers

    wanted = [OmegaConf.select(cfg, key) for key in FACTS]
    remedy = "give a whole mixture-of-experts model that transformers has code for: no other is run"
    with loading(f"the config of {source or cfg.name}", remedy), torch.device("meta"):
        own, safe = transformers.AutoConfig, {"trust_remote_code": False}
        config = own.from_pretrained(source, **safe) if source else own.for_model(wanted[0])
        told = cfg.dtype or getattr(config.get_text_config(), "dtype", None) or config.dtype
        dtype = getattr(torch, str(told or "bfloat16").removeprefix("torch."))
        model: Any = class_for(config).from_config(config, dtype=dtype, **safe)
        leave_text(model)
        experts: Any = find_moe_layers(model)[1][0]
        shape = shape_of(model)
        size = experts.down_proj[0].numel() // shape.hidden_size
    facts = (config.model_type, *astuple(shape), size)
    compared = zip(wanted[: 4 if weights == "scale" else None], facts, strict=False)
    if any(want not in (None, has) for want, has in compared):
        hold = f"weights={weights} hold {DESCRIPTION.format(*facts)}"
        named = f"model={cfg.name} is {DESCRIPTION.format(*wanted)}"
        raise UserError(f"{hold}, {named}; {_better(facts, Path(source or ''))}")
    return model


def _better(facts: tuple[Any, ...], folder: Path) -> str:
    """Return what to do about weights that are not the model's."""
    if folder.resolve().parent == SCALE_MODELS:
        return f"use model={folder.name} weights=scale, trained with experiments.train.scale_models"
    for path in sorted(CONF.glob("model/*.yaml")):
        model = OmegaConf.load(path)
        if facts == tuple(OmegaConf.select(model, key) for key in FACTS):
            return f"use model={path.stem}"
    return "use model=checkpoint, which takes their facts"


def _tokenizer(source: str, outline: Any) -> Any:
    import transformers

    remedy = "put the tokenizer there that the model was trained with"
    with loading(f"the tokenizer of {source}", remedy):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        ids, rows = max(tokenizer.get_vocab().values()) + 1, outline.get_input_embeddings().weight
        if not tokenizer.encode("text", add_special_tokens=False):
            raise ValueError("it makes no tokens of text, as if its files were missing")
    if ids > len(rows):
        cause = f"the tokenizer of {source} has {ids} ids, the model's vocabulary {len(rows)}"
        raise UserError(f"{cause}; {remedy}")
    return tokenizer


def _whole(source: str, dtype: torch.dtype) -> Any:
    """Return a model with every weight from its files, dequantised, and none left over."""
    import transformers

    again = "copy or download the checkpoint again"
    for path in sorted(Path(source).glob("model*.safetensors")):
        with loading(str(path), again), safe_open(path, "pt"):
            pass
    with loading(f"the weights of {source}", again):
        safe = {"trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(source, **safe)
        told: Any = getattr(config, "quantization_config", None) or {}
        if (method := told.get("quant_method")) in DEQUANTISED:
            config.quantization_config["dequantize"] = True
        elif method and method not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING:
            raise ValueError(f"transformers knows no {method}, by which they are quantised")
        checks = {"ignore_mismatched_sizes": True, "output_loading_info": True, **safe}
        load = class_for(config).from_pretrained
        model, report = load(source, config=config, dtype=dtype, device_map="cpu", **checks)
        leave_text(model)
    for kind in ("missing", "mismatched", "unexpected"):
        if keys := report[f"{kind}_keys"]:
            cause = f"{len(keys)} tensors are {kind}, such as {min(map(str, keys))}; {again}"
            raise UserError(f"the weights of {source} do not fit its config.json: {cause}")
    return model


def cast_of(cfg: DictConfig, weights: str, dtype: torch.dtype, nbytes: int) -> str | None:
    """Say of which dtype most weights were in their files, if the model has another."""
    folder = None if weights in ("dummy", "scale") else _folder(source_of(cfg, weights))
    if folder is None:
        return None
    import transformers

    own = str(dtype).removeprefix("torch.")
    stored, size = Counter[str](), 0
    for path in folder.glob("model*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, "pt") as tensors:
            for one in map(tensors.get_slice, tensors.keys()):
                stored[one.get_dtype()] += math.prod(one.get_shape())
    config = transformers.AutoConfig.from_pretrained(folder)
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        larger = f", {nbytes / size:.1f} x the bytes on host and link" if size else ""
        return f"{method} dequantised to {own}{larger}"
    (most, _), *_ = stored.most_common(1) or [(SAFETENSORS[own], 0)]
    return None if most == SAFETENSORS[own] else f"{most} cast to {own}"


def _folder(source: str) -> Path | None:
    path = try_to_load_from_cache(source, "config.json") if is_hub(source) else f"{source}/_"
    return Path(path).parent if isinstance(path, str) else None


PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_FILES = {  # limit and use by controller; version 2 has one tree, without a name
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def available_bytes() -> int:
    """Return how much host memory this process, or its group, can still take, file caches too."""
    lines = (PROC / "meminfo").read_text().splitlines()
    machine = next(line for line in lines if line.startswith("MemAvailable"))
    left = [int(machine.split()[1]) * 1024]
    # What each control group around this process has left, version 1 or 2.
    for line in (PROC / "self" / "cgroup").read_text().splitlines():
        _, controller, own = line.split(":", 2)
        if controller not in CGROUP_FILES:
            continue
        top, (limit, used) = CGROUPS / controller, CGROUP_FILES[controller]
        lowest = top / own.lstrip("/")
        for folder in (one for one in (lowest, *lowest.parents) if one.is_relative_to(top)):
            # Not there, or without a limit.
            with suppress(OSError, ValueError):
                unused = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                left.append(unused + int(stat["active_file"]) + int(stat["inactive_file"]))
    return max(0, min(left))


def free_bytes(device: torch.device) -> int:
    """Return how much more a device can hold, after what nobody uses any more was given back."""
    gc.collect()
    if device.type != "cuda":
        return available_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def complete(cfg: DictConfig) -> None:
    """Fill in what cfg.model leaves open from the config.json of `weights`; raise UserError."""
    model, weights = cfg.model, str(cfg.weights)
    if weights == "scale" or (weights in NAMED and not model.hub_id):
        cause = f"model=checkpoint reads weights=<folder or hub id>, and they are {weights}"
        raise UserError(f"{cause}; or give dummy weights the model.hub_id= to be like")
    source = source_of(model, str(model.hub_id) if weights == "dummy" else weights)
    with hub_access() if is_hub(source) else nullcontext():
        outline = outline_of(model, weights, source)
    facts = facts_of(outline, source)
    model.update({name: fact for name, fact in facts.items() if model[name] is None})


def facts_of(model: Any, source: str) -> dict[str, Any]:
    """Return the facts of a model on the meta device that a folder or hub id describes."""
    config: Any = model.config.get_text_config()
    path = Path(source)
    name = re.sub(r"[^\w.+-]+", "-", (path.resolve() if path.exists() else path).name.lower())
    facts = {
        **{"name": name.lstrip(".+-") or "checkpoint", "hub_id": source if is_hub(source) else ""},
        **{"model_type": config.model_type, "dtype": str(model.dtype).removeprefix("torch.")},
        **asdict(shape_of(model)),
        "prefetch_distance": PREFETCH_DISTANCE,
    }
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = find_moe_layers(model)[1]
    routed = {id(one) for layer in layers for one in layer.parameters()}
    dense = {name: one.nbytes for name, one in model.named_parameters() if id(one) not in routed}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    cached, attended = attention_of(config)
    facts["counted"] = {  # See finemoe.costs.counted_sizes.
        "expert_bytes": BlockLayout.of(layers[0]).nbytes,
        "dense_bytes": sum(dense.values()),
        "embedding_bytes": embedding.nbytes,
        "head_bytes": head.nbytes,
        "tied": head is embedding,
        "depth": len(kinds),
        "attention_layers": sum(map(kinds.count, GROWING)),
        "cached": cached,
        "attended": attended,
        "shared_expert_bytes": sum(size for name, size in dense.items() if "shared_" in name),
        "bytes_per_parameter": model.dtype.itemsize,
    }
    return facts | {"facts": _told(facts, Counter(kinds))}


def _told(facts: dict[str, Any], kinds: Counter[str]) -> str:
    counted = facts["counted"]
    each, count = counted["expert_bytes"], facts["layers"] * facts["experts"]
    dense, shared = (counted[f"{part}_bytes"] / 1e9 for part in ("dense", "shared_expert"))
    layers = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in kinds.items())
    return (
        f"{facts['name']} is a {facts['model_type']} in {facts['dtype']}: {facts['layers']} of "
        f"{counted['depth']} layers ({layers}) with {facts['experts']} experts, top-"
        f"{facts['top_k']}; {each / 1e6:.3g} MB each, {count * each / 1e9:.3g} GB in all, beside "
        f"them {dense:.3g} GB, of which shared experts {shared:.3g} GB; prefetch distance "
        f"{facts['prefetch_distance']} unless model.prefetch_distance says another"
    )


def attention_of(config: Any) -> tuple[int, int]:
    """Return the numbers that an attention layer keeps of a token, and its heads' width."""
    of = partial(config_value, config)
    heads = of("num_attention_heads")
    size = of("head_dim") or config.hidden_size // heads
    values = of("v_head_dim") or size
    if latent := of("kv_lora_rank"):
        rotary = of("qk_rope_head_dim")
        return latent + rotary, heads * (of("qk_nope_head_dim") + rotary + values)
    kept = of("num_key_value_heads") or heads
    return kept * (size + values), heads * (size + values)


def config_value(config: Any, name: str) -> Any:
    """Return a value of a config, also one that single layers may have otherwise."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


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


def small_model(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a random model of a family, always the same, with eager experts."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model = random_model(config, dtype, seed=0)
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
