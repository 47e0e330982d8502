"""Run the project's command line as a user does, and compose its configs in-process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).parent.parent
SMALL = (
    "workload.prompts=4",
    "workload.history_share=0.5",
    "workload.output_tokens=4",
    "workload.input_tokens=12",
    "testbed=emulated",
    "testbed.time_scale=0.01",
)


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call Python in the project's folder; return its exit code and what it printed."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=env
    )


def run_module(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call `python -m name`."""
    return python("-m", name, *arguments, **environment)


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call run.py with overrides."""
    return python("run.py", *arguments, **environment)


def config(name: str, *overrides: str) -> DictConfig:
    """Return a config of conf/ by its name."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


def composed(*overrides: str) -> DictConfig:
    """Return the config that run.py would get, small enough for a test."""
    return config("config", *SMALL, "output=unused", *overrides)


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record
