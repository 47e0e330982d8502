"""What happened when: spans of time, real or virtual, as trace events that Perfetto opens."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from finemoe.files import atomic_write

PROCESS = {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "finemoe"}}


class Timeline(Protocol):
    """Takes note of spans on named tracks; times in seconds."""

    def span(self, track: str, name: str, start: float, end: float) -> None: ...


class TraceEvents:
    """Writes spans as they come, from any thread, in the trace event format (microseconds)."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._tracks: dict[str, int] = {}
        self._lock = threading.Lock()

    def span(self, track: str, name: str, start: float, end: float) -> None:
        if end <= start:
            return
        times = {"ts": start * 1e6, "dur": (end - start) * 1e6}
        with self._lock:
            if track not in self._tracks:
                self._tracks[track] = len(self._tracks)
                self._write(track, name="thread_name", ph="M", args={"name": track})
            self._write(track, name=name, cat=track, ph="X", **times)

    def _write(self, track: str, **event: Any) -> None:
        self._file.write(",\n" + json.dumps({**event, "pid": 0, "tid": self._tracks[track]}))


@contextmanager
def trace_events(folder: str, wanted: bool) -> Iterator[TraceEvents | None]:
    """Write what happens in the block, if it ends well, to `timeline.json` for ui.perfetto.dev."""
    if not wanted:
        yield None
        return
    with atomic_write(Path(folder, "timeline.json")) as partial, partial.open("w") as file:
        file.write(f'{{"displayTimeUnit": "ms", "traceEvents": [\n{json.dumps(PROCESS)}')
        yield TraceEvents(file)
        file.write("\n]}\n")
