"""The background searcher: order, errors, back pressure and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from finemoe.offload.worker import Worker

PATIENCE = 10.0


def never(error: BaseException) -> None:
    pytest.fail(f"unexpected {error!r}")


def failing() -> None:
    raise RuntimeError("broken search")


def started(capacity: int, on_error: Callable[[BaseException], None]) -> Worker:
    worker = Worker(capacity, on_error)
    worker.start()
    return worker


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_tasks_run_in_the_order_they_were_published() -> None:
    done: list[int] = []
    worker = started(3, never)
    for number in range(50):
        worker.publish(partial(done.append, number))
    worker.drain()
    assert done == list(range(50))
    worker.close()


def test_a_full_queue_makes_the_publisher_wait() -> None:
    begun, release = threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        begun.set()
        release.wait(PATIENCE)

    worker = started(2, never)
    worker.publish(first)
    assert begun.wait(PATIENCE)
    for number in range(2):
        worker.publish(partial(done.append, number))
    publisher = in_thread(lambda: worker.publish(lambda: done.append(2)))
    publisher.join(0.1)
    assert publisher.is_alive()
    release.set()
    publisher.join(PATIENCE)
    worker.close()
    assert done == [0, 1, 2]


def test_drain_waits_for_the_task_under_way() -> None:
    release = threading.Event()
    done: list[str] = []

    def slow() -> None:
        release.wait(PATIENCE)
        done.append("slow")

    worker = started(1, never)
    worker.publish(slow)
    drainer = in_thread(worker.drain)
    drainer.join(0.1)
    assert drainer.is_alive()
    release.set()
    drainer.join(PATIENCE)
    assert not drainer.is_alive()
    assert done == ["slow"]
    worker.close()


def test_only_the_first_error_is_reported_and_later_tasks_are_dropped() -> None:
    errors: list[BaseException] = []
    done: list[str] = []
    worker = started(4, errors.append)
    worker.publish(lambda: done.append("before"))
    worker.publish(failing)
    worker.publish(lambda: done.append("after"))
    worker.publish(failing)
    worker.close()
    assert done == ["before"]
    assert [str(error) for error in errors] == ["broken search"]


def test_after_an_error_neither_publish_nor_drain_nor_close_blocks() -> None:
    worker = started(1, lambda error: None)
    done: list[int] = []

    def publish_many() -> None:
        worker.publish(failing)
        for number in range(100):
            worker.publish(partial(done.append, number))
        worker.drain()
        worker.close()

    publisher = in_thread(publish_many)
    publisher.join(PATIENCE)
    assert not publisher.is_alive()
    assert done == []


def test_even_a_system_exit_reaches_the_listener() -> None:
    errors: list[BaseException] = []
    worker = started(1, errors.append)

    def leave() -> None:
        raise SystemExit(3)

    worker.publish(leave)
    worker.close()
    assert [type(error) for error in errors] == [SystemExit]
