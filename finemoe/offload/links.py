"""Live links: how a chunk of an expert gets from the host to its slot, and how long it takes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from finemoe.offload.cache import Slot
from finemoe.offload.experts import DeviceSlots, HostStore
from finemoe.offload.transfer import Chunk


class Link(Protocol):
    """One host-to-device path, driven by one thread."""

    depth: int
    """Chunks that may be in flight at once."""

    def start(self, chunk: Chunk) -> None:
        """Begin to copy a chunk."""

    def finish(self) -> None:
        """Wait until the oldest chunk in flight has arrived."""

    def idle(self) -> None:
        """Take note that there is nothing to copy."""

    def guard(self, slot: Slot) -> None:
        """Keep later copies into `slot` from overtaking the kernels that still read it."""


@dataclass(frozen=True)
class LinkSpeed:
    """Rate in bytes of the stored experts per second, and seconds that every transfer adds."""

    bytes_per_second: float
    latency: float


class EmulatedLink:
    """A real copy on the CPU, paced to a rate and a latency in real time.

    Whoever drives it notices late that a chunk arrived. The next one is on schedule nevertheless,
    so a demand that was made in between begins before it was made; `lag_seconds` says by how much.
    """

    depth = 1

    def __init__(self, store: HostStore, slots: DeviceSlots, speed: LinkSpeed) -> None:
        self._store = store
        self._slots = slots
        self._speed = speed
        self._free_at = 0.0
        self._counted_to = 0.0
        self._busy = False
        self._sent = 0
        """Bytes of the chunk in flight."""
        self.copied_bytes = 0
        self.copying_seconds = 0.0
        self.lags = 0
        """How often a chunk followed another without a pause."""
        self.lag_seconds = 0.0
        """How long after the other was due they were begun, in all."""

    def start(self, chunk: Chunk) -> None:
        # A link that was busy goes on from its own schedule, so that late wake-ups do not add up.
        now = time.perf_counter()
        if not self._busy:
            self._free_at = self._counted_to = now
        else:
            self.lags += 1
            self.lag_seconds += now - self._free_at
        self._busy = True
        self._sent = chunk.stop - chunk.start
        self._free_at += self._sent / self._speed.bytes_per_second
        if chunk.start == 0:
            self._free_at += self._speed.latency
        source = self._store.block(chunk.flat)
        self._slots.block(chunk.slot)[chunk.start : chunk.stop].copy_(
            source[chunk.start : chunk.stop]
        )

    def finish(self) -> None:
        wait = self._free_at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        self.copied_bytes += self._sent
        now = time.perf_counter()
        self.copying_seconds += now - self._counted_to
        self._counted_to = now

    def idle(self) -> None:
        self._busy = False

    def guard(self, slot: Slot) -> None:
        pass


class CudaLink:
    """Copies from pinned memory on a stream of their own, at most two chunks in flight."""

    depth = 2

    def __init__(self, store: HostStore, slots: DeviceSlots, device: torch.device) -> None:
        self._store = store
        self._slots = slots
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # What filled the slots before may still be under way on the device's own stream.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._readers: dict[Slot, torch.cuda.Event] = {}

    def start(self, chunk: Chunk) -> None:
        reader = self._readers.pop(chunk.slot, None)
        if reader is not None:
            self._stream.wait_event(reader)
        source = self._store.block(chunk.flat)
        with torch.cuda.stream(self._stream):
            self._slots.block(chunk.slot)[chunk.start : chunk.stop].copy_(
                source[chunk.start : chunk.stop], non_blocking=True
            )
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        self._in_flight.append(arrived)

    def finish(self) -> None:
        self._in_flight.popleft().synchronize()

    def idle(self) -> None:
        pass

    def guard(self, slot: Slot) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._readers[slot] = event
