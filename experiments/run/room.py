"""What has to fit a device beside its experts, and what it has free."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Sequence

import torch

CUDA_BYTES = 500_000_000
"""What CUDA and its libraries take of a device for kernels and workspaces; assumed."""


def free_bytes(device: torch.device) -> int:
    """Return how much more a device can hold, after what nobody uses any more was given back."""
    gc.collect()
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def shortage(devices: Sequence[torch.device], slots: Sequence[int], expert_bytes: int) -> str:
    """Return in words which device cannot hold its slots; nothing if all can."""
    experts: Counter[torch.device] = Counter()
    for device, count in zip(devices, slots, strict=True):
        experts[device] += count * expert_bytes
    for device, asked in experts.items():
        beside = CUDA_BYTES if device.type == "cuda" else 0
        free = free_bytes(device)
        if asked + beside > free:
            return (
                f"{asked / 1e9:.1f} GB of experts on {device}, beside which {beside / 1e9:.1f} GB "
                f"are needed and of which {free / 1e9:.1f} GB are free"
            )
    return ""
