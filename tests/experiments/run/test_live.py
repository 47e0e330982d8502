"""What a live run holds on its devices, and when."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from experiments.run import live, protocol
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.live import load_setup
from finemoe.offload.device import DeviceSlots
from tests.command import SMALL, composed, config
from tests.engine import saved_mixtral
from tests.pretend_cuda import pretend_cuda


def test_the_slots_of_a_repeat_are_gone_before_the_next_takes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        cfg = composed("workload.repeats=3", "timeline=true")
        cfg.output = str(tmp_path / "run")
        protocol.run(cfg, Console())
    finally:
        gc.enable()
    assert held == [0, 0, 0]


def test_six_devices_that_hold_all_experts_together_verify_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "CUDA_BYTES", 0)
    weights = saved_mixtral(tmp_path / "model", 3, intermediate=2048)
    facts = {"layers": 3, "experts": 4, "hidden_size": 16, "expert_intermediate_size": 2048}
    words = [f"weights='{weights}'", *(f"model.{name}={value}" for name, value in facts.items())]
    words += [
        "testbed=local",
        "memory_budget=50%",
        "workload.prompts=2",
        f"output='{tmp_path / 'run'}'",
    ]
    small = [one for one in SMALL if not one.startswith("testbed")]
    cfg = config("config", *small, *words)
    with pretend_cuda(6) as roomy:
        setup = load_setup(cfg, build(cfg.testbed))
        experts = setup.shape.size * setup.model.offloaded.store.layout.nbytes
        dense = roomy.allocated[0]
        del setup
        gc.collect()
    # A sixth of the experts leaves the other parts some room; all of them do not fit.
    with pretend_cuda(6, memory=dense + experts // 2) as made:
        record = protocol.run(cfg, Console())
        gc.collect()
    assert record["summary"]["lossless"] is True
    assert record["history"] == "served with everything resident"
    assert made.hazards == []
