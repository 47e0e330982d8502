"""Run the project's command line as a user does, and compose its configs in-process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call run.py with overrides; return its exit code and what it printed."""
    return subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def composed(*overrides: str) -> DictConfig:
    """Return the config that run.py would get, small enough for a test."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*SMALL, "output=unused", *overrides])
