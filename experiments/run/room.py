"""What has to fit the host and a device beside its experts, and what is free there."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Limit and use of a group, by controller: version 2 has one tree for all, without a name."""
CUDA_BYTES = 500_000_000
"""What CUDA and its libraries take of a device for kernels and workspaces; assumed."""


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
