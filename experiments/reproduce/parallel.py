"""Tasks side by side: over this machine's cores (joblib) or those of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from joblib import Parallel, delayed, parallel_config, register_parallel_backend
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import BACKENDS

from experiments.errors import UserError, file_errors
from finemoe.trace import TraceError

LAUNCHERS = ("joblib", "ray")
CHECK_SECONDS = 0.5
KILLED = "a worker process was killed, perhaps for want of memory"
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Task:
    """A module-level function and what to call it with, in another process."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Ended:
    """How a task ended: well, or with one line that says why not."""

    name: str
    error: str | None = None
    bad_input: bool = False
    trace: str | None = None
    """The traceback of an error that is nobody's bad input."""


def side_by_side(tasks: Sequence[Task], launcher: str, n_jobs: int) -> Iterator[Ended]:
    """Yield how each task ended, as they end; no task's failure stops the others.

    Every task has one thread. Raises UserError if the launcher's package is missing.
    """
    if tasks:
        yield from (_over_ray if launcher == "ray" else _over_cores)(tasks, n_jobs)


def _over_cores(tasks: Sequence[Task], n_jobs: int) -> Iterator[Ended]:
    left = {task.name for task in tasks}
    with (
        warnings.catch_warnings(),
        parallel_config(
            "loky",
            n_jobs=n_jobs,
            inner_max_num_threads=1,
            initializer=settle,
            initargs=(os.getcwd(), os.getpid()),
        ),
    ):
        # joblib replaces a worker whose memory grew, and warns of it; nothing is lost.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
        jobs = (delayed(attempt)(task) for task in tasks)
        try:
            for ended in parallel(jobs):
                left.discard(ended.name)
                yield ended
        except TerminatedWorkerError:
            for name in sorted(left):
                yield Ended(name, f"{KILLED}; start again, with n_jobs=1 if it happens again")


def _over_ray(tasks: Sequence[Task], n_jobs: int) -> Iterator[Ended]:
    try:
        import ray
    except ImportError as error:
        raise UserError("launcher=ray needs Ray: pip install -e '.[ray]'") from error
    if not ray.is_initialized():
        # RAY_ADDRESS names a cluster; without it, Ray starts on this machine.
        cores = None if os.environ.get("RAY_ADDRESS") else n_jobs
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(num_cpus=cores, include_dashboard=False, **quiet)
    remote = ray.remote(in_worker)
    names = {remote.remote(task, os.getcwd()): task.name for task in tasks}
    while names:
        (ready,), _ = ray.wait(list(names), num_returns=1)
        name = names.pop(ready)
        try:
            yield ray.get(ready)
        except ray.exceptions.RayError:
            yield Ended(name, f"{KILLED}; start again")


def in_worker(task: Task, folder: str) -> Ended:
    """Carry out a task in a worker process of Ray, in the folder where the user stands."""
    settle(folder, None)
    return attempt(task)


def attempt(task: Task) -> Ended:
    """Carry out a task; return how it ended."""
    try:
        with file_errors():
            task.function(*task.arguments)
    except (UserError, TraceError) as error:
        return Ended(task.name, str(error), bad_input=True)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        told = f"{type(error).__name__}: {lines[0]}"
        return Ended(task.name, told, trace=traceback.format_exc())
    return Ended(task.name)


@cache
def settle(folder: str, owner: int | None) -> None:
    """Make a fresh worker quiet, single-threaded, and end with its owner; once a process."""
    if owner is not None:
        end_with(owner)
    os.environ.update(QUIET)
    os.chdir(folder)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def end_with(owner: int) -> None:
    """Make this worker end when its owner does, so that two never work on the same run.

    Interrupting the terminal interrupts the owner, which ends its workers.
    """

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(CHECK_SECONDS)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def end_workers_with_this_process() -> None:
    """Make the workers of whoever uses joblib here, such as Hydra's launcher, end with us."""
    backend = partial(BACKENDS["loky"], initializer=end_with, initargs=(os.getpid(),))
    register_parallel_backend("loky", backend)
