"""Which weights a config names: what a kept trace and a run record are of, read without torch."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

SCALE_MODELS = Path(__file__).parent / "scale"
OF_A_MODEL = ("config.json", "model*.safetensors", "pytorch_model*.bin")
LARGE = 2**30
"""From this size in bytes on, a file is told by its size and time of change: reading takes long."""


def fingerprint(model: Any, weights: str, seed: int) -> str:
    """Return 16 hex digits that change whenever the weights do; `model` is a config's group.

    Of scale models and folders it is over their files, whose absence changes it too; of hub models
    over the revision that this machine holds, if it holds one; of dummies over their seed.
    """
    if weights == "dummy":
        told = [("dummy", str(seed))]
    elif weights == "hub":
        told = [(model["hub_id"], _revision(model["hub_id"]))]
    else:
        folder = SCALE_MODELS / model["name"] if weights == "scale" else Path(weights)
        found = sorted(path for pattern in OF_A_MODEL for path in folder.glob(pattern))
        told = [(path.name, _content(path)) for path in found]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _revision(hub_id: str) -> str:
    reference = Path(HF_HUB_CACHE, "models--" + hub_id.replace("/", "--"), "refs", "main")
    return reference.read_text().strip() if reference.exists() else "unknown"


def _content(path: Path) -> str:
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Return a file's digest, once a process for as long as it does not change."""
    if size >= LARGE:
        return f"{size} bytes of {changed}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
