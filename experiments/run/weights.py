"""Which weights a config names and how files are fetched or refused, without torch."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import logging

from experiments import ROOT
from experiments.errors import UserError

SCALE_MODELS = ROOT / "experiments" / "scale"
OF_A_MODEL = ("config.json", "model*.safetensors", "pytorch_model*.bin")
NAMED = ("scale", "dummy", "hub")  # go with a model of conf/model; others bring their own facts
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LARGE = 2**30  # bytes, from which on a file is told by its size and time of change


def fingerprint(model: Any, weights: str, seed: int) -> str:
    """Return 16 hex digits that change whenever the weights do; `model` is a config's group.

    Of scale models and folders it is over their files, whose absence changes it too; of hub models
    over the revision that this machine holds, if it holds one; of dummies over their seed.
    """
    if weights == "dummy":
        facts = [("dummy", str(seed))]
    elif is_hub(weights):
        hub_id = model["hub_id"] if weights == "hub" else weights
        name = "models--" + hub_id.replace("/", "--")
        reference = Path(constants.HF_HUB_CACHE, name, "refs", "main")
        revision = reference.read_text().strip() if reference.exists() else "unknown"
        facts = [(hub_id, revision)]
    else:
        folder = folder_of(model, weights).resolve()
        paths = sorted(path for pattern in OF_A_MODEL for path in folder.glob(pattern))
        stats = [(path, path.stat()) for path in paths]
        facts = [(path.name, _digest(path, one.st_size, one.st_mtime_ns)) for path, one in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def is_hub(weights: str) -> bool:
    """Tell whether weights come from the hub: no folder here has the name of an id."""
    named = HUB_ID.fullmatch(weights) and not Path(weights).exists()
    return weights == "hub" or bool(named)


def folder_of(model: Any, weights: str) -> Path:
    """Return where scale models and local checkpoints lie."""
    return SCALE_MODELS / model["name"] if weights == "scale" else Path(os.path.expanduser(weights))


def source_of(model: Any, weights: str) -> str:
    """Return the folder or hub id of weights; UserError for a folder that is no checkpoint."""
    if is_hub(weights):
        return str(model.hub_id) if weights == "hub" else weights
    path = folder_of(model, weights)
    if (path / "config.json").exists():
        return str(path)
    if weights == "scale":
        train = f"train one with python -m experiments.train.scale_models model={model.name}"
        others = "or use weights=dummy, weights=hub or a local folder"
        raise UserError(f"no scale model of {model.name} is there; {train}, {others}")
    known = "neither scale, dummy, hub nor a folder with config.json, nor owner/name on the hub"
    raise UserError(f"weights={weights} is {known}")


def model_of(overrides: Sequence[str]) -> list[str]:
    """Choose the model that weights bring with them, if they do and no other is chosen."""
    told = {key.lstrip("+"): value for key, _, value in (one.partition("=") for one in overrides)}
    own = "weights" in told and {*told["weights"].split(",")}.isdisjoint(NAMED)
    return ["model=checkpoint"] if own and "model" not in told else []


@contextmanager
def hub_access() -> Iterator[None]:
    """Let the block ask the hub, or say that it cannot be reached and ask the cache alone."""
    # The library's own handler prints already; Hydra's would print everything again.
    logging.disable_propagation()
    before, unreachable = constants.HF_HUB_OFFLINE, None
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # Of a type that changes with the client's HTTP library.
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
    except Exception as error:  # Libraries and their readers raise dozens of unrelated types.
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
        elif isinstance(error, MemoryError):
            remedy = "lift its limit (ulimit -l unlimited), or take a smaller model"
        raise UserError(f"cannot load {what}: {cause.rstrip(' .')}; {remedy}") from error


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Return a file's digest, once a process for as long as it does not change."""
    if size >= LARGE:
        return f"{size} bytes of {changed}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
