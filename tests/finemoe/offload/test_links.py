"""The emulated link's schedule, by a clock that only sleeping and the test move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from experiments.run.small_models import small_model
from finemoe.offload import links
from finemoe.offload.cache import ExpertCache, Slot
from finemoe.offload.experts import DeviceSlots
from finemoe.offload.links import EmulatedLink, LinkSpeed
from finemoe.offload.model import OffloadedModel
from finemoe.offload.transfer import PrefetchQueue, TransferQueue

SLOT = Slot(0, 0)
FLAT = 3
LATENCY = 0.5


@dataclass
class Clock:
    """Stands for the module `time`."""

    now: float = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(links, "time", made)
    return made


@pytest.fixture
def model() -> OffloadedModel:
    return OffloadedModel.from_model(small_model("mixtral"), torch.device("cpu"))


def test_chunks_arrive_by_the_link_s_own_schedule(clock: Clock, model: OffloadedModel) -> None:
    size = model.store.layout.nbytes
    third = size // 3
    assert third * 3 == size
    cache = ExpertCache(model.shape, (1,), keys=lambda incoming, urgent: np.zeros((3, 4)))
    queue = TransferQueue(cache, PrefetchQueue(cache), 0, size, third)
    slots = DeviceSlots(model.store, (1,), (torch.device("cpu"),))

    def start() -> None:
        chunk = queue.next_chunk()
        assert chunk is not None
        link.start(chunk)

    # A third of an expert takes a second.
    link = EmulatedLink(model.store, slots, LinkSpeed(float(third), LATENCY))
    queue.demand(FLAT)
    start()
    link.finish()
    assert clock.now == pytest.approx(101.5)
    # Whoever drives the link is late; the schedule is kept.
    clock.now += 0.3
    start()
    link.finish()
    assert clock.now == pytest.approx(102.5)
    start()
    link.finish()
    assert clock.now == pytest.approx(103.5)
    assert torch.equal(slots.block(SLOT), model.store.block(FLAT))
    assert link.lags == 2
    assert link.lag_seconds == pytest.approx(0.3)
    assert link.copied_bytes == size
    assert link.copying_seconds == pytest.approx(clock.now - 100)
    # After a pause it begins anew, and what the pause took is no lag.
    link.idle()
    clock.now = 200
    cache.loaded(FLAT)
    queue.demand(FLAT + 1)
    start()
    link.finish()
    assert clock.now == pytest.approx(201.5)
    assert link.lags == 2
