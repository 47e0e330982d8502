"""Load the model that a config names, with its experts already out of the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.weights import SCALE_MODELS
from finemoe.offload.model import OffloadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """An offloaded model, its tokenizer, and what one of its full-size experts weighs."""

    name: str
    weights: str
    offloaded: OffloadedModel
    tokenizer: Any
    full_expert_bytes: int

    @property
    def identity(self) -> str:
        """What a store of expert maps is marked with."""
        return f"{self.name} with weights {self.weights}"


def load_model(cfg: DictConfig, weights: str, device: torch.device, seed: int) -> LoadedModel:
    """Load `weights` (scale, dummy, hub, or a local path) of the model that `cfg` describes.

    Raises UserError if they are missing, gated, or no mixture-of-experts model.
    """
    from transformers import AutoTokenizer

    dtype = getattr(torch, cfg.dtype)
    if weights == "dummy":
        offloaded = _dummy(cfg, dtype, device, seed)
        tokenizer = AutoTokenizer.from_pretrained(SCALE_MODELS / cfg.dummy_tokenizer)
    else:
        source = _source(cfg, weights)
        model, tokenizer = _pretrained(source, dtype)
        try:
            offloaded = OffloadedModel.from_model(model, device)
        except ValueError as error:
            raise UserError(f"{source}: {error}; choose a mixture-of-experts model") from error
    full = full_expert_bytes(cfg, weights, offloaded.store.layout.nbytes)
    if weights == "scale":
        _check_shape(cfg, offloaded)
    return LoadedModel(cfg.name, weights, offloaded, tokenizer, full)


def load_plain(cfg: DictConfig, weights: str) -> tuple[PreTrainedModel, Any]:
    """Return the model whole, as transformers has it, on the CPU, and its tokenizer.

    Raises UserError if its weights are missing, gated, or would be random.
    """
    if weights == "dummy":
        raise UserError("weights=dummy exist one expert at a time; use scale, hub or a folder")
    return _pretrained(_source(cfg, weights), getattr(torch, cfg.dtype))


def full_expert_bytes(cfg: DictConfig, weights: str, stored: int) -> int:
    """Return the bytes of one full-size expert of a model whose own take `stored`."""
    return 3 * cfg.hidden_size * cfg.expert_intermediate_size * 2 if weights == "scale" else stored


def _source(cfg: DictConfig, weights: str) -> str:
    if weights == "hub":
        return str(cfg.hub_id)
    path = SCALE_MODELS / cfg.name if weights == "scale" else Path(weights)
    if (path / "config.json").exists():
        return str(path)
    if weights == "scale":
        raise UserError(
            f"no scale model of {cfg.name} is there; train one with python -m "
            f"experiments.scale_models model={cfg.name}, or use weights=dummy, weights=hub or a "
            "local folder"
        )
    raise UserError(f"weights={weights} is neither scale, dummy, hub nor a folder with config.json")


def _pretrained(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map="cpu")
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load {source}: {cause} (is it there, is the network up, and if it is gated, "
            "has `hf auth login` been run?)"
        ) from error


def _dummy(cfg: DictConfig, dtype: torch.dtype, device: torch.device, seed: int) -> OffloadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model(cfg.scale.config.model_type)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return OffloadedModel.from_meta(model, device, seed)


def _check_shape(cfg: DictConfig, model: OffloadedModel) -> None:
    shape = model.shape
    if (shape.layers, shape.experts, shape.top_k) != (cfg.layers, cfg.experts, cfg.top_k):
        raise UserError(
            f"the scale model of {cfg.name} has the shape {shape.layers} x {shape.experts} "
            f"top-{shape.top_k}, not the paper's; train it again"
        )
