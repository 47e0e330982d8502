"""What has to fit the host and a device beside its experts, and what is free there."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.run.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Limit and use of a group, by controller: version 2 has one tree for all, without a name."""
MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
CUDA_BYTES = 500_000_000
"""Assumed; see `needed_beside`."""

Parts = Mapping[str, int]
Extent = tuple[int, int, int]
"""The most tokens in caches, tokens in a prefill and rows of logits that there are at once."""


def available_bytes() -> int:
    """Return how much host memory this process can still take: its machine's or its group's.

    File caches are given back on demand, so they count as available.
    """
    lines = (PROC / "meminfo").read_text().splitlines()
    machine = next(line for line in lines if line.startswith("MemAvailable"))
    return max(0, min([int(machine.split()[1]) * 1024, *_left_to_groups()]))


def _left_to_groups() -> Iterator[int]:
    """Yield what each control group around this process has left, version 1 or 2."""
    for line in (PROC / "self" / "cgroup").read_text().splitlines():
        _, controller, own = line.split(":", 2)
        if controller not in CGROUP_FILES:
            continue
        top, (limit, used) = CGROUPS / controller, CGROUP_FILES[controller]
        lowest = top / own.lstrip("/")
        for folder in (one for one in (lowest, *lowest.parents) if one.is_relative_to(top)):
            # Not there, or without a limit.
            with suppress(OSError, ValueError):
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                yield left + int(stat["active_file"]) + int(stat["inactive_file"])


def free_bytes(device: torch.device) -> int:
    """Return how much more a device can hold, after what nobody uses any more was given back."""
    gc.collect()
    if device.type != "cuda":
        return available_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def attention_of(config: Any) -> tuple[int, int]:
    """Return the numbers that an attention layer keeps of a token: keys and values, or their latent
    form; and the width of all heads' keys and values."""
    heads = _of(config, "num_attention_heads")
    size = _of(config, "head_dim") or config.hidden_size // heads
    values = _of(config, "v_head_dim") or size
    if latent := _of(config, "kv_lora_rank"):
        rotary = _of(config, "qk_rope_head_dim")
        return latent + rotary, heads * (_of(config, "qk_nope_head_dim") + rotary + values)
    return (_of(config, "num_key_value_heads") or heads) * (size + values), heads * (size + values)


def _of(config: Any, name: str) -> Any:
    """Return a value of a config, also one that single layers may have otherwise."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def needed_beside(
    config: PreTrainedConfig, top_k: int, width: int, extents: Sequence[Extent]
) -> Parts:
    """Return the bytes that serving takes beside weights, by part, of numbers `width` bytes wide.

    - KV cache: 2 x layers x keys and values for each token of the most that lie in caches at once,
      padding included: all twice, for a cache that grows or is joined is copied.
    - activations: (10 + K) h + 4 w for each token of the longest prefill: hidden states, attention
      (of h, or all its heads) and the outputs of K experts; and one expert, of width w, that all
      tokens went to. Attention keeps no matrix of scores.
    - logits: the vocabulary for each row of them.
    - CUDA: 0.5 GB on each device, for kernels, workspaces and what its allocator cannot use.
    """
    (kept, attended), hidden = attention_of(config), config.hidden_size
    widest = max(_of(config, name) or 0 for name in MLP_WIDTHS)
    cached, prefill, rows = map(max, *extents, (0, 0, 0))
    layer = (10 + top_k) * max(hidden, attended // 2) + 4 * widest
    return {
        "KV cache": 2 * config.num_hidden_layers * kept * cached * width,
        "activations": layer * prefill * width,
        "logits": config.vocab_size * rows * width,
        "CUDA": CUDA_BYTES,
    }


def extent(schedule: Schedule, logs: bool = False) -> Extent:
    """Run through a schedule as if all requests were there; with `logs`, logits are kept."""
    cached = prefill = rows = pending = 0
    while step := schedule.next(math.inf, 0):
        lengths = [
            len(one.prompt) + n for one, n in zip(step.requests, step.generated, strict=True)
        ]
        cached = max(cached, len(lengths) * max(lengths))
        if step.phase == "prefill":
            prefill = max(prefill, sum(lengths))
        pending += len(lengths)
        rows = max(rows, pending if logs else len(lengths))
        pending *= not step.leaving
        schedule.done(step)
    return cached, prefill, rows


def shortage(
    devices: Sequence[torch.device], slots: Sequence[int], expert_bytes: int, beside: Parts
) -> str:
    """Return in words which device cannot hold its slots and the rest; nothing if all can.

    All but the first only run experts.
    """
    experts: Counter[torch.device] = Counter()
    for device, count in zip(devices, slots, strict=True):
        experts[device] += count * expert_bytes
    for device, asked in experts.items():
        names = beside if device == devices[0] else ("activations", "CUDA")
        parts = {name: beside[name] for name in names if device.type == "cuda" or name != "CUDA"}
        if asked + sum(parts.values()) > (free := free_bytes(device)):
            rest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
            has = f"has {free / 1e9:.1f} GB free, with {sum(parts.values()) / 1e9:.1f} GB needed"
            return f"{asked / 1e9:.1f} GB of experts on {device}, which {has} beside them ({rest})"
    return ""
