"""Tasks side by side: over this machine's cores (joblib) or those of a Ray cluster."""

import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from joblib import Parallel, delayed, parallel_config, register_parallel_backend
from joblib.parallel import BACKENDS

from experiments.errors import UserError, file_errors
from finemoe.trace import TraceError

KILLED = "a worker process was killed, perhaps for want of memory; start again, or with n_jobs=1"
Tasks = Mapping[str, Callable[[], object]]  # functions that another process can import, by name


@dataclass(frozen=True)
class Outcome:
    """How a task ended: well, or with one line that says why not."""

    name: str
    error: str | None = None
    bad_input: bool = False
    trace: str | None = None  # the traceback of an error that is nobody's bad input


def side_by_side(tasks: Tasks, launcher: str, n_jobs: int) -> Generator[Outcome, None, None]:
    """Yield how each task ended, as they end; no task's failure stops the others.

    In other processes, where every task has one thread, unless there is but one job. Raises
    UserError if the launcher's package is missing.
    """
    left = dict(tasks)
    try:
        for outcome in LAUNCHERS[launcher](tasks, n_jobs) if tasks else ():
            del left[outcome.name]
            yield outcome
    except BrokenProcessPool:
        yield from (Outcome(name, KILLED) for name in left)


def _cores(tasks: Tasks, n_jobs: int) -> Iterable[Outcome]:
    # That a worker whose memory grew is replaced, or tasks are given up, is no news here.
    warnings.filterwarnings("ignore", category=UserWarning, module="joblib")
    own = {"initializer": settle, "initargs": (os.getcwd(), os.getpid())}
    as_they_end: Any = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "all"}
    with parallel_config("loky", inner_max_num_threads=1, **own):
        return Parallel(n_jobs, **as_they_end)(delayed(attempt)(*task) for task in tasks.items())


def _ray(tasks: Tasks, n_jobs: int) -> Iterator[Outcome]:
    try:
        import ray
    except ImportError as error:
        raise UserError("launcher=ray needs Ray: pip install -e '.[ray]'") from error
    if not ray.is_initialized():
        # RAY_ADDRESS names a cluster; without it, Ray starts on this machine.
        cores = None if os.environ.get("RAY_ADDRESS") else n_jobs
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        folder = os.getcwd()
        hook = {"worker_process_setup_hook": lambda: settle(folder)}
        ray.init(num_cpus=cores, include_dashboard=False, runtime_env=hook, **quiet)
    # Of one core, and so of one thread.
    remote = ray.remote(attempt)
    names = {remote.remote(*task).future(): task[0] for task in tasks.items()}
    for future in as_completed(names):
        yield Outcome(names[future], KILLED) if future.exception() else future.result()


LAUNCHERS = {"joblib": _cores, "ray": _ray}


def attempt(name: str, task: Callable[[], object]) -> Outcome:
    """Carry out a task; return how it ended."""
    try:
        with file_errors():
            task()
    except (UserError, TraceError) as error:
        return Outcome(name, str(error), bad_input=True)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return Outcome(name, f"{type(error).__name__}: {first_line}", trace=traceback.format_exc())
    return Outcome(name)


def settle(folder: str, owner: int | None = None) -> None:
    """Make a worker quiet, single-threaded, stand where the user does, and end with its owner."""
    if owner is not None:
        end_with(owner)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.chdir(folder)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def end_with(owner: int) -> None:
    """Make this worker end when its owner does, which alone hears of a Ctrl-C."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def end_workers_with_this_process() -> None:
    """Make the workers of whoever uses joblib here, such as Hydra's launcher, end with us."""
    backend = partial(BACKENDS["loky"], initializer=end_with, initargs=(os.getpid(),))
    register_parallel_backend("loky", backend)
