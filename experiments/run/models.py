"""Load the model that a config names, with its experts already out of the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from experiments import CONF
from experiments.errors import UserError
from experiments.run.room import available_bytes
from experiments.run.weights import SCALE_MODELS, hub_access, is_hub, loading, source_of
from finemoe.offload.model import (
    OffloadedModel,
    class_for,
    find_moe_layers,
    leave_text,
    shape_of,
)

if TYPE_CHECKING:
    import transformers

FACTS = (
    *("scale.config.model_type", "layers", "experts", "top_k"),
    *("hidden_size", "expert_intermediate_size"),
)
"""What tells models apart; scale models have the first four in common with the full ones."""

DEQUANTISED = ("fp8", "mxfp4")
"""How weights may be quantised that transformers can bring to the model's own dtype."""

SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

LOADING_SHARE = 1.15
"""What loading takes in terms of what it must; 1.0 for large tensors, up to this for small ones."""

DESCRIPTION = "a {} of {} x {} experts, top-{}, with hidden size {} and expert size {}"


@dataclass(frozen=True)
class LoadedModel:
    """An offloaded model, its tokenizer, and what one of its full-size experts weighs."""

    name: str
    weights: str
    offloaded: OffloadedModel
    tokenizer: Any
    full_expert_bytes: int
    cast: str | None = None
    """From which dtype to which most of the weights were brought, if that is not their own."""

    @property
    def positions(self) -> int | None:
        """For how many tokens the model was made; None if it does not say."""
        config = self.offloaded.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def check_weights(cfg: DictConfig) -> None:
    """Raise UserError if a folder's or the hub's config.json is of another model, or missing.

    What the hub's cache lacks is compared when it is loaded.
    """
    model, weights = cfg.model, str(cfg.weights)
    if folder := _folder(source_of(model, weights)):
        outline_of(model, weights, str(folder))


def load_model(cfg: DictConfig, weights: str, device: torch.device, seed: int) -> LoadedModel:
    """Load `weights` of the model of `cfg`; UserError if they are missing, damaged or another's."""
    if weights == "dummy":
        borrowed = cfg.dummy_tokenizer and str(SCALE_MODELS / cfg.dummy_tokenizer)
        outline = outline_of(cfg, weights, None if borrowed else source_of(cfg, cfg.hub_id))
        with loading(f"weights={weights}", "choose another model"), _locking(outline, 1):
            tokenizer: Any = _tokenizer(borrowed or source_of(cfg, cfg.hub_id), outline)
            offloaded = OffloadedModel.from_meta(outline, device, seed)
    else:
        model, tokenizer = load_plain(cfg, weights)
        with loading(f"weights={weights}", "choose another model"), _locking(model):
            offloaded = OffloadedModel.from_model(model, device)
    full = full_expert_bytes(cfg, weights, offloaded.store.layout.nbytes)
    held = offloaded.dense_bytes + offloaded.shape.size * offloaded.store.layout.nbytes
    cast = cast_of(cfg, weights, offloaded.model.dtype, held)
    return LoadedModel(cfg.name, weights, offloaded, tokenizer, full, cast)


def load_plain(cfg: DictConfig, weights: str) -> tuple[transformers.PreTrainedModel, Any]:
    """Return the whole model on the CPU and its tokenizer; UserError as in `load_model`."""
    if weights == "dummy":
        raise UserError("weights=dummy exist one expert at a time; use scale, hub or a folder")
    source = source_of(cfg, weights)
    with hub_access() if is_hub(weights) else nullcontext():
        outline = outline_of(cfg, weights, source)
        tokenizer = _tokenizer(source, outline)
        _check_memory(outline, f"weights={weights} of {cfg.name}")
        return _whole(source, outline.dtype), tokenizer


def _check_memory(outline: transformers.PreTrainedModel, what: str) -> None:
    """Raise UserError unless the host has room for the peak of loading a model.

    That is when its first MoE layer has been copied into blocks, or by DeepSpeed, and not been
    freed yet: all weights and that layer twice. Files are mapped, and their pages given back.
    """
    whole = sum(parameter.nbytes for parameter in outline.parameters())
    layers = list(_layer_bytes(outline))
    needed, free = LOADING_SHARE * (whole + max(layers)), available_bytes()
    if needed > free:
        cause = f"loading {what} takes {needed / 1e9:.1f} GB of host memory"
        parts = f"{sum(layers) / 1e9:.1f} GB for experts stay"
        remedy = "choose a smaller model or a machine with more memory"
        raise UserError(f"{cause} ({parts}), and {free / 1e9:.1f} GB are available; {remedy}")


@contextmanager
def _locking(model: transformers.PreTrainedModel, experts: int | None = None) -> Iterator[None]:
    """Say what helps if the system refuses to page-lock so many of the experts; None: all."""
    shape, layer = shape_of(model), next(_layer_bytes(model))
    wanted = layer // shape.experts * (experts or shape.size)
    try:
        yield
    except MemoryError as error:
        free = f"{wanted / 1e9:.1f} GB are wanted and {available_bytes() / 1e9:.1f} GB available"
        remedy = "lift the limit (ulimit -l unlimited), or take a smaller model or a larger machine"
        raise UserError(f"{error}: for experts {free}; {remedy}") from error


def _layer_bytes(model: transformers.PreTrainedModel) -> Iterator[int]:
    """Yield the bytes of each layer's experts."""
    for module in find_moe_layers(model)[1]:
        yield sum(parameter.nbytes for parameter in module.parameters(recurse=False))


def full_expert_bytes(cfg: DictConfig, weights: str, stored: int) -> int:
    """Return the bytes of one full-size expert of a model whose own take `stored`."""
    return 3 * cfg.hidden_size * cfg.expert_intermediate_size * 2 if weights == "scale" else stored


def outline_of(cfg: DictConfig, weights: str, source: str | None) -> transformers.PreTrainedModel:
    """Return the model on the meta device; raise UserError unless it is the one of `cfg`."""
    import transformers

    wanted = [OmegaConf.select(cfg, key) for key in FACTS]
    remedy = "give a whole mixture-of-experts model that transformers has code for: no other is run"
    with loading(f"the config of {source or cfg.name}", remedy), torch.device("meta"):
        configs = transformers.AutoConfig
        if source is None:
            config = configs.for_model(wanted[0])
        else:
            config = configs.from_pretrained(source, trust_remote_code=False)
        told = cfg.dtype or getattr(config.get_text_config(), "dtype", None) or config.dtype
        dtype = getattr(torch, str(told or "bfloat16").removeprefix("torch."))
        model: Any = class_for(config).from_config(config, dtype=dtype, trust_remote_code=False)
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
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if (method := _quantised(config)) in DEQUANTISED:
            config.quantization_config["dequantize"] = True
        elif method and method not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING:
            raise ValueError(f"transformers knows no {method}, by which they are quantised")
        checks = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        options = {"dtype": dtype, "device_map": "cpu", "trust_remote_code": False}
        load = class_for(config).from_pretrained
        model, report = load(source, config=config, **options, **checks)
        leave_text(model)
    for kind in ("missing", "mismatched", "unexpected"):
        if keys := report[f"{kind}_keys"]:
            cause = f"{len(keys)} tensors are {kind}, such as {min(map(str, keys))}; {again}"
            raise UserError(f"the weights of {source} do not fit its config.json: {cause}")
    return model


def _quantised(config: Any) -> str | None:
    """Return by which method the weights of a config are quantised, if they are."""
    told: Any = getattr(config, "quantization_config", None)
    return told and str(told.get("quant_method"))


def cast_of(cfg: DictConfig, weights: str, dtype: torch.dtype, nbytes: int) -> str | None:
    """Say what most weights were in their files, if a model of `nbytes` in `dtype` has others.

    Quantised ones are dequantised: kernels for them run on some GPUs only. What that costs is said.
    """
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
    if method := _quantised(transformers.AutoConfig.from_pretrained(folder)):
        larger = f", {nbytes / size:.1f} x the bytes on host and link" if size else ""
        return f"{method} dequantised to {own}{larger}"
    (most, _), *_ = stored.most_common(1) or [(SAFETENSORS[own], 0)]
    return None if most == SAFETENSORS[own] else f"{most} cast to {own}"


def _folder(source: str) -> Path | None:
    """Return the folder of weights, if they are here."""
    path = try_to_load_from_cache(source, "config.json") if is_hub(source) else f"{source}/_"
    return Path(path).parent if isinstance(path, str) else None
