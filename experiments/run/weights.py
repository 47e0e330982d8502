"""Which weights a config names and how files are fetched or refused, without torch."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import logging
from omegaconf import OmegaConf

from experiments import CONF, ROOT
from experiments.errors import UserError

SCALE_MODELS = ROOT / "experiments" / "scale"
MODELS = sorted(CONF.glob("model/*.yaml"))
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
        folder = folder_of(model, weights)
        found = sorted(path for pattern in OF_A_MODEL for path in folder.glob(pattern))
        told = [(path.name, _content(path)) for path in found]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def folder_of(model: Any, weights: str) -> Path:
    """Return where scale models and local checkpoints lie."""
    return SCALE_MODELS / model["name"] if weights == "scale" else Path(os.path.expanduser(weights))


def source_of(model: Any, weights: str) -> str:
    """Return the folder or hub id of weights; UserError for a folder that is no checkpoint."""
    if weights == "hub":
        return str(model.hub_id)
    path = folder_of(model, weights)
    if (path / "config.json").exists():
        _check_family(model, path)
        return str(path)
    if weights == "scale":
        raise UserError(
            f"no scale model of {model.name} is there; train one with python -m "
            f"experiments.train.scale_models model={model.name}, or use weights=dummy, "
            "weights=hub or a local folder"
        )
    raise UserError(f"weights={weights} is neither scale, dummy, hub nor a folder with config.json")


def _check_family(model: Any, folder: Path) -> None:
    """Refuse weights of another family of conf/model at a glance; what else is amiss takes longer.

    Raises UserError.
    """
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder / "config.json").read_text()).get("model_type")
        wanted = model.scale.config.model_type
        known = {OmegaConf.load(path).scale.config.model_type: path.stem for path in MODELS}
        if found != wanted and found in known:
            told = f"weights={folder} hold a {found} model, while model={model.name} is a {wanted}"
            raise UserError(f"{told}; use model={known[found]}")


@contextmanager
def hub_access() -> Iterator[None]:
    """Let the block ask the hub or, if that cannot be reached, the cache alone, which is said.

    The libraries would try for half a minute for every file.
    """
    # The library's own handler prints already; Hydra's would print everything again.
    logging.disable_propagation()
    before, unreachable = constants.HF_HUB_OFFLINE, None
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        # What a failed connection raises changes with the client's HTTP library.
        unreachable = error
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
    if unreachable:
        print(f"{constants.ENDPOINT}: {unreachable}; what the cache holds is used", file=sys.stderr)


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads `what` into a UserError with the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # transformers, datasets and their readers raise dozens of unrelated types.
        cause = "".join(filter(str.isprintable, shorten(str(error), 160, placeholder=" ...")))
        if not isinstance(error, OSError | ValueError | ImportError | RuntimeError):
            cause = f"{type(error).__name__} {cause}"
        causes: list[BaseException] = [error]
        while deeper := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(deeper)
        if isinstance(error, ImportError):
            remedy = "install what it needs, or use weights without it"
        elif any(isinstance(one, LocalEntryNotFoundError | ConnectionError) for one in causes):
            cause = f"it is not in the cache, and {constants.ENDPOINT} cannot be reached"
            remedy = "connect, or use what needs no network: weights=scale, dataset=docs"
        elif any(isinstance(one, RepositoryNotFoundError) for one in causes):
            remedy = "check its name, ask for access on its page and run `hf auth login`"
        raise UserError(f"cannot load {what}: {cause.rstrip(' .')}; {remedy}") from error


def _revision(hub_id: str) -> str:
    reference = Path(constants.HF_HUB_CACHE, "models--" + hub_id.replace("/", "--"), "refs", "main")
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
