"""Run the project's command line as a user does, and compose its configs in-process."""

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

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


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Call Python in the project's folder; return its exit code and what it printed."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call `python -m name` in this process."""
    return _here(partial(runpy.run_module, name), arguments)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call run.py with overrides, in this process."""
    return _here(partial(runpy.run_path, "run.py"), arguments)


def _here(run: Callable[..., Any], words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    code, out, errors = 0, StringIO(), StringIO()
    called, kept = patch.object(sys, "argv", ["", *words]), patch.dict(os.environ)
    with chdir(ROOT), called, kept, redirect_stdout(out), redirect_stderr(errors):
        try:
            run(run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def carried_out(*arguments: str) -> str:
    """Call run.py, which must succeed; return what it printed."""
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line in which a command refused, with exit code 2."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def unlike(*groups: str) -> tuple[str, ...]:
    """Return what makes a run small, but for options of some groups."""
    return tuple(one for one in SMALL if not one.startswith(groups))


def begun(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Start Python in the project's folder; its descendants hold the pipe that it prints to."""
    return subprocess.Popen(
        [sys.executable, "-u", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background may ignore interrupts, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


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
