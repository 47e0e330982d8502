"""What a checkpoint says of its model: facts that conf/model/checkpoint.yaml leaves open."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.models import outline_of
from experiments.run.room import attention_of
from experiments.run.weights import NAMED, hub_access, is_hub, source_of
from finemoe.offload.device import BlockLayout
from finemoe.offload.model import find_moe_layers, shape_of

if TYPE_CHECKING:
    import transformers

GROWING = ("full_attention", "sliding_attention", "indexed_attention", "hybrid", "hybrid_sliding")
"""Kinds of layers that keep something of every token."""

PREFETCH_DISTANCE = 3
"""Of a model for which nobody measured one: the paper's for Mixtral (section 6.1)."""


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


def facts_of(model: transformers.PreTrainedModel, source: str) -> dict[str, Any]:
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
    facts["counted"] = _counted(model, kinds)
    return facts | {"facts": _told(facts, Counter(kinds))}


def _counted(model: transformers.PreTrainedModel, kinds: list[str]) -> dict[str, Any]:
    """Return what finemoe.costs.CountedModel has beside the routing."""
    layers = find_moe_layers(model)[1]
    routed = {id(one) for layer in layers for one in layer.parameters()}
    dense = {name: one.nbytes for name, one in model.named_parameters() if id(one) not in routed}
    embedding, head = (
        one.weight for one in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    cached, attended = attention_of(model.config.get_text_config())
    return {
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


def _told(facts: dict[str, Any], kinds: Counter[str]) -> str:
    """Return facts as a line."""
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
