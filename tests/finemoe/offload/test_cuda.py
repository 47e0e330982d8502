"""The CUDA path on pretended devices: ordered, lossless, within memory, and nothing left behind."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run import live, routing
from experiments.run.console import Console
from experiments.run.live import LiveBackend, PlainRuntime
from experiments.run.models import load_model, small_model
from experiments.run.protocol import run
from experiments.run.routing import kept_trace
from experiments.run.schedule import FixedBatches, Server
from finemoe.assemble import measured_machine, resident_runtime
from finemoe.offload import device
from finemoe.offload.device import CudaLink, ExpertKernel
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Iteration, ModelShape, Policy, Routing
from finemoe.offload.transfer import Chunk
from finemoe.testbed import Testbed
from finemoe.trace import TraceReader
from tests import engine
from tests.command import config
from tests.engine import OPTIONS, configured, logits_of, offloaded, prepared, requests
from tests.pretend_cuda import Event, Machine, Stream, join, pretend_cuda

HOSTED = ("fiddler", "freetoken", "hybrimoe", "planner_host")
OUTPUT = 4


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Keep what was there before out of collections, which runs and tests make many of."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


BATCHES = requests(1, 7, output=OUTPUT), requests(3, 7, first=10, output=OUTPUT)


@cache
def expected(family: str) -> tuple[list[Tensor], Routing]:
    """Return logits on the CPU with every expert resident, and the routing of every iteration."""
    model = offloaded(family)
    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        return logits_on(runtime), engine.recorded(model, *BATCHES)[1]


def logits_on(runtime: LiveRuntime | PlainRuntime) -> list[Tensor]:
    return logits_of(runtime, *BATCHES)


@contextmanager
def machine(devices: int = 1, **options: Any) -> Iterator[Machine]:
    """Enter a machine that is left without a hazard, and with nothing allocated or page-locked."""
    with pretend_cuda(devices, **options) as made:
        yield made
        gc.collect()
        assert made.hazards == []
        assert (sum(made.allocated), made.locked) == (0, {})


@contextmanager
def offloading(
    made: Machine, model: OffloadedModel, policy: Policy, slots: int
) -> Iterator[LiveRuntime]:
    """Enter a runtime with `slots` on each device, all of which are still at something else."""
    devices = tuple(torch.device("cuda", index) for index in range(made.devices))
    testbed = Testbed("pretended", "measured", devices, chunk_bytes=1024)
    busy = [torch.zeros(8, device=one) for one in devices]
    with engine.offloading(model, policy, (slots,) * made.devices, testbed=testbed) as runtime:
        yield runtime
    assert len(busy) == made.devices
    runtime.residency.cache.check_integrity()


def systems() -> list[str]:
    """Return one system for each way in which a device can tell them apart."""
    shape, found = ModelShape(3, 4, 2, 32), dict[Any, str]()
    for system in [*OPTIONS, "resident"]:
        policy = configured(system, shape)
        found.setdefault((policy.placement, policy.host_experts is None), system)
    return [*found.values()]


def on_cuda(family: str = "mixtral") -> OffloadedModel:
    return OffloadedModel.from_model(small_model(family), torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("devices", "family", "system"),
    [
        *((1, "mixtral", system) for system in systems()),
        *((6, "qwen2_moe", system) for system in ("on_demand", "deepspeed", "finemoe", "resident")),
        *((6, "qwen2_moe", system) for system in ("fiddler", "planner_host")),
    ],
)
def test_systems_of_every_kind_serve_the_same_logits(
    devices: int, family: str, system: str
) -> None:
    logits, routing = expected(family)
    with machine(devices, capability=(8, 6)) as made:
        model = on_cuda(family)
        policy = prepared(configured(system, model.shape), model)
        if policy.set_future_routing:
            policy.set_future_routing(routing)
        # So few that a prefill brings the experts of a layer in waves.
        few = model.shape.top_k if devices == 1 else 1
        slots = model.shape.size if policy.placement.everything_resident else few
        hosted = list[int]()
        with offloading(made, model, policy, slots) as runtime:
            runtime.listeners.append(lambda outcome: hosted.extend(outcome.host))
            # The pretended device has the host's arithmetic.
            assert all(map(torch.equal, logits_on(runtime), logits))
        assert bool(hosted) == (system in HOSTED)
        # Without grouped kernels that need no host, experts compute one by one.
        assert made.kernels["mm"] > made.kernels["_grouped_mm"] == 0
        del model, policy, runtime


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = engine.tiny(tmp_path_factory.mktemp("tiny") / "model")
    return [*made, "testbed=local", "testbed.chunk_mb=0.1"]


OFFLINE = (
    *("workload.prompts=4", "workload.history_share=0.5", "workload.output_tokens=3"),
    *("workload.input_tokens=8", "workload.batch_size=2", "workload.repeats=2"),
    *("timeline=true", "record=true"),
)
ONLINE = (
    *("workload=online", "workload.requests=4", "workload.rate=1000", "workload.max_batch_size=2"),
    *("workload.max_input_tokens=8", "workload.max_output_tokens=3"),
)


@pytest.mark.parametrize(("devices", "workload"), [(1, OFFLINE), (6, ONLINE)])
def test_a_run_leaves_a_complete_measured_lossless_record(
    devices: int, workload: tuple[str, ...], tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *workload, "memory_budget=50%", f"output='{tmp_path}'"]
    with machine(devices):
        record = run(config("config", *words), Console())
    assert (record["status"], record["mode"]) == ("complete", "measured")
    assert record["testbed"].startswith(f"{devices} x Pretended GPU")
    assert record["summary"]["lossless"] is True
    assert record["summary"]["hits"] + record["summary"]["misses"] > 0
    assert min(record["summary"]["cpu_seconds"][one] for one in ("model", "links")) > 0
    assert len(pd.read_parquet(tmp_path / "requests.parquet")) == 4
    if workload is OFFLINE:
        assert (tmp_path / "timeline.json").exists()
        assert (tmp_path / "trace.parquet").exists()


def test_host_logits_are_not_lossless(tiny: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    measure = measured_machine

    def measured(*facts: Any) -> Any:
        found = measure(*facts)
        assert min(found.load, found.host(1), found.device(1)) > 0
        return engine.machine(facts[2])

    monkeypatch.setattr(live, "measured_machine", measured)
    words = [*tiny, *OFFLINE, "memory_budget=50%", "system=fiddler", f"output='{tmp_path}'"]
    with machine():
        summary = run(config("config", *words), Console())["summary"]
    assert (summary["lossless"], summary["same_tokens"], summary["bound"]) == (None, True, None)
    assert summary["lossless_note"].startswith("not comparable bit for bit")
    assert summary["host"] > 0
    assert summary["bytes_not_copied"] == summary["host"] * 3 * 16 * 16 * 2
    assert pd.read_parquet(tmp_path / "requests.parquet")["host"].sum() > 0


@pytest.mark.parametrize(("share", "experts"), [(0.01, 3), (0.8, 6)], ids=["some", "all"])
def test_routing_is_recorded_with_the_experts_that_fit_all_devices(
    share: float, experts: int, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny[:-2], "testbed=a100", *OFFLINE[:6], f"traces='{tmp_path}'"]
    cfg = config("config", *words)
    with TraceReader(kept_trace(cfg, Console(quiet=True))) as trace:
        expected = trace.request(0).output
    cfg.traces, dense = str(tmp_path / "cuda"), dense_bytes(cfg)
    monkeypatch.setattr(routing, "SHARE", share)
    with machine(2, memory=dense + 500_000) as made:
        path = kept_trace(cfg, Console(quiet=True))
        # Of the second device: experts of 1,536 bytes, and what less than six of them take beside.
        assert experts <= made.peak[1] / 1536 < experts + 6
    with TraceReader(path) as trace:
        assert trace.request(0).output == expected


def dense_bytes(cfg: DictConfig) -> int:
    """Return what a device has allocated once a model is loaded."""
    with machine() as roomy:
        model = load_model(cfg.model, cfg.weights, torch.device("cuda", 0), cfg.seed)
        dense = roomy.allocated[0]
        del model
    return dense


def test_a_device_out_of_memory(tiny: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    cfg = config("config", *tiny, *OFFLINE, "memory_budget=50%", f"output='{tmp_path}'")
    dense = dense_bytes(cfg)
    monkeypatch.setattr(live, "shortage", lambda *_: "")
    with machine(memory=dense + 40_000), pytest.raises(UserError, match=r"out of memory.*; lower"):
        run(cfg, Console())


def no_guard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaLink, "guard", lambda link, slot: None)


def readers_ignored(patch: pytest.MonkeyPatch) -> None:
    start = CudaLink.start

    def hasty(link: CudaLink, chunk: Chunk) -> None:
        patch.setattr(link._stream, "wait_event", lambda event: None)
        start(link, chunk)

    patch.setattr(CudaLink, "start", hasty)


def told_early(patch: pytest.MonkeyPatch) -> None:
    """A copy is taken for done when it was begun, by the link and by the model's kernels."""
    patch.setattr(CudaLink, "finish", lambda link: (link._in_flight.popleft(), (0.0, 0.0))[1])
    patch.setattr(CudaLink, "admit", lambda link, slot: None)


def guarded_early(patch: pytest.MonkeyPatch) -> None:
    """What guards a slot is recorded before the kernel that reads it."""
    call, begun = ExpertKernel.__call__, dict[torch.device, Any]()

    def marked(kernel: ExpertKernel, rows: Tensor, weights: Any) -> Tensor:
        begun[rows.device] = torch.cuda.current_stream(rows.device).record_event()
        return call(kernel, rows, weights)

    def guard(link: CudaLink, slot: Any) -> None:
        link._readers[slot] = begun[link._device]

    patch.setattr(ExpertKernel, "__call__", marked)
    patch.setattr(CudaLink, "guard", guard)


def not_locked(patch: pytest.MonkeyPatch) -> None:
    block = device.host_block
    patch.setattr(device, "host_block", lambda nbytes, pin: block(nbytes, pin=False))
    patch.setattr(device, "_unlock", lambda pointers: None)


def unlocked_early(patch: pytest.MonkeyPatch) -> None:
    """The store is unlocked while a link may still copy from it."""
    start = CudaLink.start

    def hasty(link: CudaLink, chunk: Chunk) -> None:
        start(link, chunk)
        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(link._store.blocks[chunk.flat].data_ptr())

    patch.setattr(CudaLink, "start", hasty)


def slots_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """A link begins though its device may still use what is to become slots."""
    make = CudaLink.__init__

    def hasty(link: CudaLink, *given: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(Stream, "wait_stream", lambda stream, other: None)
            within.setattr(Event, "synchronize", lambda event: None)
            make(link, *given, **options)

    patch.setattr(CudaLink, "__init__", hasty)


@pytest.mark.parametrize(
    "broken",
    [
        *(no_guard, readers_ignored, told_early, guarded_early),
        *(not_locked, unlocked_early, slots_not_awaited),
    ],
)
def test_what_is_broken_is_found(broken: Any, monkeypatch: Any) -> None:
    with pretend_cuda(2) as made:
        broken(monkeypatch)
        model = on_cuda()
        with offloading(made, model, OnDemandPolicy(model.shape), slots=1) as runtime:
            logits_on(runtime)
        del model, runtime
        gc.collect()
    assert made.hazards != []


def test_memory_that_is_freed_or_rewritten_too_early_is_found() -> None:
    with pretend_cuda() as made:
        there = torch.cuda.Stream(0)
        freed, source = torch.ones(8, device="cuda:0"), torch.ones(8).pin_memory()
        there.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(there):
            freed.mul_(2)
        del freed
        source.to("cuda:0", non_blocking=True)
        source.zero_()
        torch.cuda.synchronize()
    assert "is freed under mul_" in made.hazards[0]
    assert "host memory is written before a copy from it" in made.hazards[1]


def per_decode(made: Machine, runtime: Any) -> tuple[int, int]:
    """Return the kernels that a decode iteration launches, and how often it waits for a device."""
    seen = [(made.kernels.total(), made.waits.total())]

    def count(_: Any) -> None:
        seen.append((made.kernels.total(), made.waits.total()))

    server = Server(LiveBackend(runtime), listeners=[count])
    list(server.serve(FixedBatches(requests(1, 7, output=OUTPUT), 1)))
    (kernels, waits), (all_kernels, all_waits) = seen[-2:]
    return all_kernels - kernels, all_waits - waits


class Generating(PlainRuntime):
    """Runs a model with the kernels that `generate` takes for one request."""

    def forward(self, iteration: Iteration, **inputs: Any) -> Any:
        one = inputs["input_ids"].numel() == 1
        self.model.set_experts_implementation("batched_mm" if one else "grouped_mm")
        return super().forward(iteration, **inputs)


def plain_on_cuda(family: str) -> PlainRuntime:
    model: Any = small_model(family)
    return Generating(model.to("cuda:0"))


@pytest.mark.parametrize(("family", "system"), [("mixtral", "on_demand"), ("qwen2_moe", "finemoe")])
def test_a_decode_waits_for_its_token_and_layers_that_may_miss(family: str, system: str) -> None:
    with machine() as made:
        generating = per_decode(made, plain_on_cuda(family))
        assert generating[1] == 1
        model = on_cuda(family)
        layers, policy = model.shape.layers, prepared(configured(system, model.shape), model)
        with resident_runtime(model, policy, grouped=True) as runtime:
            assert per_decode(made, runtime) == generating
        half = model.shape.size // 2
        with offloading(made, model, policy, half) as runtime:
            kernels, waits = per_decode(made, runtime)
        # An expert: two products, activation (2), weighing (2) and sum; batched ones: 10 a layer.
        assert kernels <= generating[0] + layers * (7 * model.shape.top_k - 9)
        assert waits <= 1 + layers
        del model, policy, runtime


def test_all_that_is_resident_equals_the_grouped_model() -> None:
    with machine() as made:
        plain = logits_on(plain_on_cuda("qwen2_moe"))
        model = on_cuda("qwen2_moe")
        policy = OnDemandPolicy(model.shape)
        with offloading(made, model, policy, model.shape.size) as runtime:
            assert runtime.grouped
            assert all(map(torch.equal, logits_on(runtime), plain))
        del model, policy, runtime


def test_devices_compute_their_experts_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels that are launched one after another, few on different devices are ordered."""
    call, ran = ExpertKernel.__call__, list[tuple[Any, dict[Any, int], int]]()
    with machine(6) as made:

        def noted(kernel: ExpertKernel, rows: Tensor, weights: Any) -> Tensor:
            stream: Any = torch.cuda.current_stream(rows.device)
            known = {**stream.clock}
            join(known, made.host.clock)
            output = call(kernel, rows, weights)
            ran.append((stream.key, known, stream.clock[stream.key]))
            return output

        monkeypatch.setattr(ExpertKernel, "__call__", noted)
        model = on_cuda("olmoe")
        each = model.shape.size // made.devices
        with offloading(made, model, OnDemandPolicy(model.shape), each) as runtime:
            engine.serve(runtime, requests(3, 7, output=1))
        del model, runtime
    apart = [(a, b) for a, b in pairwise(ran) if a[0] != b[0]]
    ordered = [b[1].get(a[0], 0) >= a[2] for a, b in apart]
    assert sum(ordered) < 0.5 * len(ordered)
