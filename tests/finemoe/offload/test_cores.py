"""Cores apart: the model's thread, and the threads beside it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from finemoe.offload.cores import Cores

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity"
)


@pytest.fixture
def mine() -> Iterator[set[int]]:
    """Return this thread's cores, and give them back whatever a test does."""
    cores = os.sched_getaffinity(0)
    yield cores
    os.sched_setaffinity(0, cores)


def test_no_cores_are_apart_where_the_model_takes_all(mine: set[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(mine)} cores leave none beside"):
        Cores.apart(len(mine))


def test_a_thread_inherits_its_cores_and_the_starter_gets_its_own_back(mine: set[int]) -> None:
    core = max(mine)
    found: list[set[int]] = []
    with Cores(frozenset(mine), frozenset({core})).threads_beside():
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert found == [{core}]
    assert os.sched_getaffinity(0) == mine
