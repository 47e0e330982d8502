"""What a live run holds on its devices and when, and what is said to fit them."""

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from baselines.on_demand import OnDemandPolicy
from experiments.run import live, protocol
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.live import LiveBackend, load_setup
from experiments.run.models import FAMILIES
from experiments.run.schedule import ContinuousBatches, FixedBatches, Server, Step
from finemoe.assemble import resident_runtime
from finemoe.offload.budget import spread
from finemoe.offload.device import DeviceSlots
from finemoe.offload.policy import ModelShape
from tests.command import composed, config
from tests.engine import offloaded, requests, tiny
from tests.pretend_cuda import pretend_cuda


def test_slots_of_a_repeat_are_gone_before_the_next(tmp_path: Path, monkeypatch: Any) -> None:
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
        cfg = composed("workload.repeats=3", "timeline=true", *tiny(tmp_path / "model"))
        cfg.output = str(tmp_path / "run")
        protocol.run(cfg, Console())
    finally:
        gc.enable()
    assert held == [0, 0, 0]


def test_six_devices_hold_all_experts_together(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(live, "CUDA_BYTES", 0)
    words = ["testbed=local", "memory_budget=50%", f"output='{tmp_path}'", "workload.prompts=2"]
    short = ["workload.output_tokens=2", "workload.input_tokens=4", "workload.history_share=0.5"]
    cfg = config("config", *tiny(tmp_path / "model", 2048), *words, *short)
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


MIXTRAL = ModelShape(32, 8, 2, 4096)
EXPERT = 352_321_536
BESIDE = {"KV cache": 400_000_000, "activations": 300_000_000, "logits": 0, "CUDA": 500_000_000}
GPUS = tuple(torch.device("cuda", index) for index in range(6))


@pytest.mark.parametrize(
    ("gigabytes", "fit"),
    [
        ((80,), False),
        ((100,), True),
        ((20, 24, 24, 24, 24, 24), True),
        ((20, 24, 24, 15, 24, 24), False),
    ],
)
def test_all_experts_fit_or_do_not(gigabytes: Any, fit: bool, monkeypatch: Any) -> None:
    def free(device: torch.device) -> tuple[int, int]:
        return int(gigabytes[device.index] * 1e9), 0

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    devices = GPUS[: len(gigabytes)]
    cause = live.shortage(devices, spread(MIXTRAL, len(devices)), EXPERT, BESIDE)
    assert (cause == "") is fit


def test_what_mixtral_needs_beside_its_experts() -> None:
    config = AutoConfig.for_model("mixtral")
    parts = live.needed_beside(config, 2, 2, [(100, 50, 2), (90, 60, 5)])
    assert parts == {
        "KV cache": 26_214_400,  # 100 tokens x 32 layers x 8 heads x 128, K and V, bf16, twice
        "activations": 12_779_520,  # 60 tokens x (12 x 4096 + 4 x 14336), bf16
        "logits": 320_000,  # 5 x 32000, bf16
        "CUDA": live.CUDA_BYTES,
    }


@pytest.mark.parametrize("schedule", [FixedBatches, ContinuousBatches])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_and_logits_are_as_large_as_said(schedule: type[FixedBatches], family: str) -> None:
    load = requests(3, 9, output=2) + requests(2, 9, first=3, output=6)
    if schedule is not FixedBatches:
        load += requests(3, 5, first=5, output=3)
    model, most = offloaded(family), Counter[str]()
    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        backend = LiveBackend(runtime)

        def look(step: Step) -> None:
            caches = {id(one.cache): one.cache for one in backend._contexts.values()}
            now = {
                "logits": backend.logits.nbytes,
                "KV cache": sum(map(nbytes_of, caches.values())),
                "prefill": sum(step.iteration.tokens) * (step.phase == "prefill"),
            }
            most.update({name: max(0, size - most[name]) for name, size in now.items()})

        list(Server(backend, listeners=[look]).serve(schedule(load, 3)))
    extent = live.extent(schedule(load, 3))
    parts = live.needed_beside(model.model.config, model.shape.top_k, 2, [extent])
    assert parts["logits"] == most["logits"]
    once = parts["KV cache"] // 2
    assert most["KV cache"] <= (once if schedule is FixedBatches else 2 * once)
    assert most["KV cache"] >= once
    assert extent[1] == most["prefill"]


def nbytes_of(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
