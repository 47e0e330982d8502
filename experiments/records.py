"""Run records: the folder that one run leaves, marked complete last (rule 6)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.weights import fingerprint

RECORD = "run.json"
REQUESTS = "requests.parquet"
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "hydra-core", "datasets", "wandb")
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{RECORD}.partial"
        partial.touch()
        partial.unlink()
    except OSError as error:
        cause = f"cannot write to {folder}: {error.strerror}"
        raise UserError(f"{cause}; choose another output=") from error
    return None


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
    partial_table = folder / f"{REQUESTS}.partial"
    requests.to_parquet(partial_table, index=False)
    os.replace(partial_table, folder / REQUESTS)
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(partial, folder / RECORD)
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


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and accelerators of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "gpus": gpus,
        "system": platform.platform(),
    }


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
