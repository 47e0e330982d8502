"""Run records: the folder that one run leaves, marked complete last (rule 6)."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.weights import fingerprint
from finemoe.files import atomic_write, partial_name

RECORD = "run.json"
REQUESTS = "requests.parquet"
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "hydra-core", "datasets", "wandb")
LONGEST_NAME = 255
"""In bytes, of a file or a folder."""
PLACES = ("output", "logger", "traces", "experiment")
"""Settings that say where results go, not what they are."""


def comparable(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as plain data, without what only says where results go."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in plain.items() if key not in PLACES}


def existing_record(cfg: DictConfig) -> Path | None:
    """Return the complete record of this very config, if the output folder holds it.

    A record whose weights have changed since is none: the run is to be done again. Raises UserError
    if the folder holds another run's record, or cannot be written to.
    """
    folder = Path(cfg.output)
    record = folder / RECORD
    if record.exists():
        held = read_record(record)
        wanted = json.loads(json.dumps(comparable(cfg)))
        if {key: value for key, value in held["config"].items() if key not in PLACES} == wanted:
            return record if of_these_weights(held) else None
        raise UserError(f"{folder} holds the record of another config; choose another output=")
    check_writable(folder, "output")
    return None


def check_writable(folder: Path, option: str) -> None:
    """Raise UserError if nothing can be written to the folder of an option; make it if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = partial_name(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        cause = f"cannot write to {folder}: {error.strerror}"
        raise UserError(f"{cause}; choose another {option}=") from error


def new_folder(parent: Path) -> Path:
    """Make a folder named by the date and the second, which no other process gets."""
    named = parent / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    named.parent.mkdir(parents=True, exist_ok=True)
    for count in itertools.count():
        folder = named.with_name(f"{named.name}-{count}") if count else named
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def sweep_folder(parent: Path, overrides: str) -> Path:
    """Return the folder of a sweep's job, named by its overrides as far as a name can be long."""
    name = overrides.encode()
    if len(name) > LONGEST_NAME:
        mark = hashlib.sha256(name).hexdigest()[:16]
        overrides = f"{name[: LONGEST_NAME - 17].decode(errors='ignore')}-{mark}"
    return parent / overrides


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is within this block for the folder; the kernel keeps count."""
    held = os.open(folder, os.O_RDONLY)
    try:
        # A file system may have no such locks.
        with suppress(OSError):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that writes to {folder}", file=sys.stderr)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def read_record(path: Path) -> dict[str, Any]:
    """Return a run record; raise UserError if the file is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record["status"] == "complete" and "config" in record:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no run record; choose another output= or remove it")


def of_these_weights(record: Mapping[str, Any]) -> bool:
    """Tell whether a run record is of the weights that its config names today."""
    config = record["config"]
    now = fingerprint(config["model"], str(config["weights"]), config["seed"])
    return bool(record.get("weights_fingerprint") == now)


def write_record(folder: Path, record: dict[str, Any], requests: pd.DataFrame) -> Path:
    """Write the request table, then the record; the record's rename makes the run complete."""
    with atomic_write(folder / REQUESTS) as partial:
        requests.to_parquet(partial, index=False)
    with atomic_write(folder / RECORD) as partial:
        partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return folder / RECORD


def provenance() -> dict[str, Any]:
    """Return what a number depends on beyond the config: versions, machine, commit, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine(),
        **git_state(),
    }


def other_code(record: Mapping[str, Any]) -> str | None:
    """Say which code made a record if it may be other than today's; None if it is the same."""
    names = "git_commit", "git_dirty"
    made, now = ([facts.get(name) for name in names] for facts in (record, git_state()))
    if made == now and not now[1]:
        return None
    told = (f"{str(commit)[:9]}{' with changes' * bool(dirty)}" for commit, dirty in (made, now))
    return "made by commit {}, now {}; delete it to run again".format(*told)


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and accelerators of this machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "gpus": gpus,
        "system": platform.platform(),
    }


@cache
def git_state() -> dict[str, Any]:
    """Return the commit of the project and whether its files, but for results, differ from it."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # What runs write there changes no later run.
    status = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"
    )
    dirty = None if status is None else bool(status)
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
