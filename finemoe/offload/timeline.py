"""What happened when: spans of time, real or virtual, as trace events that Perfetto opens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Timeline(Protocol):
    """Takes note of spans on named tracks; times in seconds."""

    def span(self, track: str, name: str, start: float, end: float) -> None: ...


@dataclass
class TraceEvents:
    """Spans in the trace event format (JSON array of complete events, times in microseconds)."""

    events: list[dict[str, Any]] = field(default_factory=list)
    tracks: dict[str, int] = field(default_factory=dict)

    def span(self, track: str, name: str, start: float, end: float) -> None:
        if end <= start:
            return
        thread = self.tracks.setdefault(track, len(self.tracks))
        self.events.append(
            {
                "name": name,
                "cat": track,
                "ph": "X",
                "pid": 0,
                "tid": thread,
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
            }
        )

    def write(self, path: Path) -> None:
        """Write a file for https://ui.perfetto.dev."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": thread, "args": {"name": track}}
            for track, thread in self.tracks.items()
        ]
        path.write_text(json.dumps({"traceEvents": names + self.events, "displayTimeUnit": "ms"}))
