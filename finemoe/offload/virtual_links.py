"""Links in virtual time: what each copies, how fast, and when it is done.

A link copies a span, all chunks of an expert that follow one another; when something else should
go first, a prefetch's span is cut after the chunks that are already in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.offload.policy import ExpertId
from finemoe.offload.residency import Residency
from finemoe.offload.timeline import Timeline
from finemoe.offload.transfer import Chunk

NEVER = float("inf")


@dataclass(frozen=True)
class LinkRate:
    """Bytes per second of one link, of all together, and seconds that transfers add."""

    bytes_per_second: float
    latency: float = 0.0
    shared_bytes_per_second: float = NEVER
    """Host memory bandwidth, which all links that copy at one time share."""
    chunks_in_flight: int = 1
    """A demand waits for as many chunks of a prefetch."""
    wake: float = 0.0
    """Seconds until an idle link that is given something begins with it."""

    def each(self, copying: int) -> float:
        """Return what each of `copying` links gets."""
        return min(self.bytes_per_second, self.shared_bytes_per_second / max(copying, 1))


@dataclass(slots=True)
class _Span:
    chunk: Chunk
    began: float
    moves_from: float
    """When bytes begin to move; before that is latency."""
    sent: float
    """Bytes moved at `moves_from`."""
    end: float


class VirtualLinks:
    """One link a device; `kick` after every change of a queue, `progress` when `next_event` is due.

    With a host bandwidth that binds, the rate of a span changes when another link starts or stops.
    """

    def __init__(self, residency: Residency, rate: LinkRate, timeline: Timeline | None) -> None:
        self.next_event = NEVER
        self._residency = residency
        self._queues = residency.queues
        self._rate = rate
        self._timeline = timeline
        self._spans: list[_Span | None] = [None] * len(residency.queues)
        self._speeds = [rate.each(copying) for copying in range(len(residency.queues) + 1)]
        self._speed = self._speeds[1]
        self._chunk_bytes = residency.plan.chunk_bytes

    @property
    def copying(self) -> bool:
        """Whether any link copies."""
        return self.next_event != NEVER

    def kick(self, now: float) -> None:
        """Start idle links that have something to copy, and cut spans that must give way."""
        for device, span in enumerate(self._spans):
            if span is None:
                self._start(device, now, self._rate.wake)
            elif not span.chunk.urgent and self._queues[device].gives_way(span.chunk):
                self._cut(device, span, now)
        self._settle(now)

    def progress(self, now: float) -> list[ExpertId]:
        """End the spans that are due and go on; return the experts that arrived."""
        arrived = []
        for device, span in enumerate(self._spans):
            if span is None or span.end > now:
                continue
            self._spans[device] = None
            if self._timeline:
                why = "on demand" if span.chunk.urgent else "prefetch"
                name = f"{why} {span.chunk.expert.layer}.{span.chunk.expert.index}"
                self._timeline.span(f"link {device}", name, span.began, span.end)
            expert = self._residency.chunk_done(device, span.chunk)
            if expert is not None:
                arrived.append(expert)
            self._start(device, now)
        self._settle(now)
        return arrived

    def _start(self, device: int, now: float, wake: float = 0.0) -> None:
        chunk = self._queues[device].next_span()
        if chunk is None:
            return
        moves_from = now + wake + (self._rate.latency if chunk.start == 0 else 0.0)
        end = moves_from + (chunk.stop - chunk.start) / self._speed
        self._spans[device] = _Span(chunk, now, moves_from, 0.0, end)

    def _cut(self, device: int, span: _Span, now: float) -> None:
        """End a span after the chunks that are in flight now."""
        length = span.chunk.stop - span.chunk.start
        moved = span.sent + _moved(span, now, self._speed)
        begun = int(moved // self._chunk_bytes) + self._rate.chunks_in_flight
        kept = begun * self._chunk_bytes
        if kept >= length:
            return
        span.chunk = self._queues[device].cut(span.chunk, span.chunk.start + kept)
        span.end = max(now, span.moves_from) + (kept - moved) / self._speed

    def _settle(self, now: float) -> None:
        """Share the host's bandwidth among the links that copy, and note the next event."""
        ends = [span.end for span in self._spans if span is not None]
        speed = self._speeds[len(ends)]
        if ends and speed != self._speed:
            ends = [self._change_speed(span, now, speed) for span in self._spans if span]
            self._speed = speed
        self.next_event = min(ends) if ends else NEVER

    def _change_speed(self, span: _Span, now: float, speed: float) -> float:
        """Let a span go on at another speed; return when it ends."""
        span.sent += _moved(span, now, self._speed)
        left = span.chunk.stop - span.chunk.start - span.sent
        span.moves_from = max(now, span.moves_from)
        span.end = span.moves_from + left / speed
        return span.end


def _moved(span: _Span, now: float, speed: float) -> float:
    """Return the bytes moved since `moves_from`."""
    return max(0.0, now - span.moves_from) * speed
