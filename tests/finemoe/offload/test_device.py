"""Host blocks, and the emulated link's schedule by a clock that only sleeping and the test move."""

import mmap

import numpy as np
import pytest
import torch

from experiments.run.models import small_model
from finemoe.offload import device
from finemoe.offload.cache import ExpertCache, Slot
from finemoe.offload.device import DeviceSlots, EmulatedLink, HostStore
from finemoe.offload.model import find_moe_layers
from finemoe.offload.transfer import PrefetchQueue, TransferQueue
from tests.engine import Clock, offloaded, page_locks

SLOT = Slot(0, 0)
FLAT = 3
LATENCY = 0.5


def test_chunks_arrive_by_the_link_s_own_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = offloaded(), Clock()
    monkeypatch.setattr(device, "time", clock)
    size = model.store.layout.nbytes
    third = size // 3
    assert third * 3 == size
    cache = ExpertCache(model.shape, (1,), keys=lambda incoming, urgent: np.zeros((3, 4)))
    prefetches = PrefetchQueue(cache)
    queue = TransferQueue(cache, prefetches, 0, size, third)
    slots = DeviceSlots.allocate(model.store.layout, (1,), (torch.device("cpu"),))

    # A third of an expert takes a second.
    link = EmulatedLink(model.store, slots, float(third), LATENCY)
    prefetches.put(FLAT, 1.0)

    def copy_until(due: float) -> None:
        chunk = queue.next_chunk()
        assert chunk is not None
        link.start(chunk)
        link.finish()
        assert clock.now == pytest.approx(due)

    copy_until(101.5)
    # Whoever drives the link is late; the schedule is kept.
    clock.now += 0.3
    copy_until(102.5)
    copy_until(103.5)
    assert torch.equal(slots.block(SLOT), model.store.blocks[FLAT])
    assert (link.lags, link.copied_bytes) == (2, size)
    assert link.lag_seconds == pytest.approx(0.3)
    assert link.copying_seconds == pytest.approx(clock.now - 100)
    # After a pause it begins anew, and what the pause took is no lag.
    link.idle()
    clock.now = 200
    cache.loaded(FLAT)
    prefetches.put(FLAT + 1, 1.0)
    copy_until(201.5)
    assert link.lags == 2
    # The rest of it, demanded meanwhile, is one chunk.
    queue.demand(FLAT + 1)
    copy_until(203.5)
    assert (link.lags, link.copied_bytes) == (3, 2 * size)


def test_no_two_locked_blocks_share_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = page_locks(monkeypatch, 1000)
    store = HostStore.take_from(find_moe_layers(small_model("qwen2_moe"))[1], pin=True)
    pages = [
        range(pointer // mmap.PAGESIZE, (pointer + nbytes - 1) // mmap.PAGESIZE + 1)
        for pointer, nbytes in locked.items()
    ]
    assert len(pages) == len(store.blocks)
    assert len(set().union(*pages)) == sum(map(len, pages))
    assert all(pointer % mmap.PAGESIZE == 0 for pointer in locked)
    del store
    assert not locked
