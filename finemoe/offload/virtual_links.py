"""Links in virtual time: what each copies, how fast, and when it is done.

When something else should go first, a prefetch's span is cut after the chunks that are already in
flight.
"""

from dataclasses import dataclass

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
    chunks_in_flight: int = 1  # a demand waits for as many chunks of a prefetch
    lag: float = 0.0
    """Seconds after a chunk's end in which what follows it is not settled yet (`EmulatedLink`)."""
    wake: float = 0.0  # seconds until an idle link that is given something begins with it

    def each(self, copying: int, host: float = 0.0) -> float:
        """Return the rate of each link that copies while the host would read so fast.

        What is more than the memory gives slows them all down alike.
        """
        readers = max(copying, 1) + host / self.bytes_per_second
        return min(self.bytes_per_second, self.shared_bytes_per_second / readers)

    def host_share(self, copying: int, host: float) -> float:
        """Return the share that the host gets of the rate it would read at beside these links."""
        asked = host + copying * self.bytes_per_second
        return min(1.0, self.shared_bytes_per_second / asked) if asked else 1.0


class _Lane:
    """What one link copies: a span, all chunks of an expert that follow one another, or nothing."""

    def __init__(self) -> None:
        self.span: Chunk | None = None
        self.began = 0.0
        self.moves_from = 0.0  # when bytes begin to move; before that is latency
        self.sent = 0.0  # bytes moved at `moves_from`
        self.end = NEVER

    def moved(self, now: float, speed: float) -> float:
        return self.sent + max(0.0, now - self.moves_from) * speed


class VirtualLinks:
    """One link a device; `kick` after every change of a queue, `progress` when `next_event` is due.

    With a host bandwidth that binds, the rate of a span changes when another link starts or stops.
    """

    def __init__(self, residency: Residency, rate: LinkRate, timeline: Timeline | None) -> None:
        self.next_event = NEVER
        self.copying = 0  # how many links copy
        self._residency = residency
        self._queues = residency.queues
        self._rate = rate
        self._timeline = timeline
        self._lanes = [_Lane() for _ in residency.queues]
        self._speed = rate.each(1)
        self._speeds: list[float] = []
        self._share_with(0.0)
        self._chunk_bytes = residency.plan.chunk_bytes

    def kick(self, now: float) -> None:
        """Start idle links that have something to copy, and cut spans that must give way."""
        for device, lane in enumerate(self._lanes):
            if lane.span is None:
                self._start(device, lane, now, self._rate.wake)
            elif not lane.span.urgent:
                self._yield(device, lane, lane.span, now)
        self._settle(now)

    def progress(self, now: float) -> list[int]:
        """End the spans that are due and go on; return the experts waited for, as flat indices."""
        arrived = []
        for device, lane in enumerate(self._lanes):
            span = lane.span
            if span is None or lane.end > now:
                continue
            lane.span = None
            self.copying -= 1
            if self._timeline:
                name = span.name(self._residency.experts[span.flat])
                self._timeline.span(f"link {device}", name, lane.began, lane.end)
            loaded = self._residency.chunk_done(device, span)
            if loaded and self._residency.cache.is_pinned(span.flat):
                arrived.append(span.flat)
            self._start(device, lane, lane.end, 0.0)
        self._settle(now)
        return arrived

    def host_reads(self, now: float, rate: float) -> float:
        """Have the host read experts from now on; return the share of its rate that it gets.

        That is settled once, by the links that copy now. A rate of 0 ends it.
        """
        self._share_with(rate)
        self._settle(now)
        return self._rate.host_share(self.copying, rate)

    def _share_with(self, host: float) -> None:
        counts = range(len(self._lanes) + 1)
        self._speeds = [self._rate.each(copying, host) for copying in counts]

    def _start(self, device: int, lane: _Lane, now: float, wake: float) -> None:
        span = self._queues[device].next_chunk(whole=True)
        if span is None:
            return
        self.copying += 1
        lane.span = span
        lane.began, lane.sent = now, 0.0
        lane.moves_from = now + wake + (self._rate.latency if span.start == 0 else 0.0)
        lane.end = lane.moves_from + (span.stop - span.start) / self._speed

    def _yield(self, device: int, lane: _Lane, span: Chunk, now: float) -> None:
        """End a prefetch after the chunks that are in flight now, if something else is to go."""
        if not self._queues[device].gives_way(span):
            return
        moved = lane.moved(now, self._speed)
        settled = lane.moved(now - self._rate.lag, self._speed)
        begun = int(settled // self._chunk_bytes) + self._rate.chunks_in_flight
        kept = begun * self._chunk_bytes
        if kept < span.stop - span.start:
            self._queues[device].cut(span, span.start + kept)
            # With a lag this may be in the past: what follows begins before it was asked for.
            lane.end = max(now, lane.moves_from) + (kept - moved) / self._speed

    def _settle(self, now: float) -> None:
        """Share the host's bandwidth among the links that copy, and note the next event."""
        speed = self._speeds[self.copying] if self.copying else self._speed
        self.next_event = NEVER
        for lane in self._lanes:
            span = lane.span
            if span is None:
                continue
            if speed != self._speed:
                lane.sent = lane.moved(now, self._speed)
                lane.moves_from = max(now, lane.moves_from)
                lane.end = lane.moves_from + (span.stop - span.start - lane.sent) / speed
            if lane.end < self.next_event:
                self.next_event = max(lane.end, now)
        self._speed = speed
