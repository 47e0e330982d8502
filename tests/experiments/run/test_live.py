"""What a live run holds on its devices, and when."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from experiments.run import protocol
from experiments.run.console import Console
from finemoe.offload.device import DeviceSlots
from tests.command import composed


@pytest.mark.parametrize("system", ["finemoe", "on_demand"])
def test_the_slots_of_a_repeat_are_gone_before_the_next_takes_its_own(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, alive = DeviceSlots.allocate, weakref.WeakSet[DeviceSlots]()
    held: list[int] = []

    def watched(*arguments: Any) -> DeviceSlots:
        held.append(len(alive))
        made = allocate(*arguments)
        alive.add(made)
        return made

    monkeypatch.setattr(DeviceSlots, "allocate", watched)
    # Without the collector whatever is left in a cycle stays.
    gc.disable()
    try:
        cfg = composed(f"system={system}", "workload.repeats=3", "timeline=true")
        cfg.output = str(tmp_path / "run")
        protocol.run(cfg, Console())
    finally:
        gc.enable()
    assert held == [0, 0, 0]
