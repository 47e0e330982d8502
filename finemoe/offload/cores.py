"""Which cores of the CPU run the model, and which the threads beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """Cores by number, those of the model's thread and those of links and searcher."""

    model: frozenset[int]
    beside: frozenset[int]

    @classmethod
    def apart(cls, threads: int) -> Cores:
        """Give the model as many of this thread's cores as it has threads, the others the rest.

        Raises ValueError if none are left, or the system lets nobody choose.
        """
        if not hasattr(os, "sched_setaffinity"):
            raise ValueError("this system does not let a program choose its cores")
        cores = sorted(os.sched_getaffinity(0))
        if threads >= len(cores):
            raise ValueError(f"{len(cores)} cores leave none beside {threads} of the model")
        return cls(frozenset(cores[:threads]), frozenset(cores[threads:]))

    def model_thread(self) -> AbstractContextManager[None]:
        """Keep the calling thread on the model's cores."""
        return _on(self.model)

    def threads_beside(self) -> AbstractContextManager[None]:
        """Have the threads that are started here run beside the model: they inherit the cores."""
        return _on(self.beside)


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
