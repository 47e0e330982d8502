"""The background searcher: consumes what inference publishes (section 4.3 of the paper)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Task = Callable[[], None]


class Worker(threading.Thread):
    """A thread that, once started, runs tasks in order from a bounded queue.

    A full queue makes the publisher wait. The first error stops the work: `on_error` is told, and
    later tasks are dropped, so a publisher never waits for a dead worker.
    """

    def __init__(self, capacity: int, on_error: Callable[[BaseException], None]) -> None:
        super().__init__(name="searcher", daemon=True)
        self._tasks: SimpleQueue[Task | threading.Event | None] = SimpleQueue()
        self._room = threading.Semaphore(capacity)
        self._on_error = on_error
        self._failed = False
        """Its own thread's."""

    def publish(self, task: Task) -> None:
        self._room.acquire()
        self._tasks.put(task)

    def drain(self) -> None:
        """Wait until every published task is done or dropped."""
        reached = threading.Event()
        self._tasks.put(reached)
        reached.wait()

    def close(self) -> None:
        """Run what is left and end the thread, if it was started."""
        self._tasks.put(None)
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                continue
            self._room.release()
            try:
                if not self._failed:
                    task()
            except BaseException as error:
                self._failed = True
                self._on_error(error)
