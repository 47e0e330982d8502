"""The CUDA path on pretended devices: ordered, lossless, within memory, and nothing left behind."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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
from experiments.run.models import load_model
from experiments.run.protocol import run
from experiments.run.routing import kept_trace
from experiments.run.schedule import FixedBatches, Server
from experiments.run.small_models import small_model
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload import device
from finemoe.offload.device import CudaLink, ExpertKernel
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import (
    FloatArray,
    Iteration,
    LayerOutcome,
    Placement,
    Policy,
    Priorities,
    Routing,
)
from finemoe.offload.transfer import Chunk
from finemoe.testbed import Testbed
from finemoe.trace import TraceReader
from tests.command import config
from tests.engine import (
    OPTIONS,
    configured,
    offloaded,
    prepared,
    requests,
    saved_mixtral,
    serve,
)
from tests.pretend_cuda import Event, Machine, Stream, pretend_cuda

SYSTEMS = [*OPTIONS, "resident"]
OUTPUT = 4


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Keep what was there before out of collections, which runs and tests make many of."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def expected(family: str) -> tuple[list[Tensor], Routing]:
    """Return logits on the CPU with every expert resident, and the routing of every iteration."""
    model, routing = offloaded(family), list[list[tuple[int, ...]]]()

    def listen(outcome: LayerOutcome) -> None:
        if outcome.layer == 0:
            routing.append([])
        routing[-1].append(outcome.activated)

    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        runtime.listeners.append(listen)
        return logits_on(runtime), routing


def logits_on(runtime: LiveRuntime | PlainRuntime) -> list[Tensor]:
    """Serve one request, then three together; return each step's logits, on the host."""
    backend, logits = LiveBackend(runtime), list[Tensor]()
    server = Server(backend, listeners=[lambda _: logits.append(backend.logits)])
    for batch in (requests(1, 7, output=OUTPUT), requests(3, 7, first=10, output=OUTPUT)):
        list(server.serve(FixedBatches(batch, len(batch))))
    return [one.cpu() for one in logits]


@contextmanager
def machine(devices: int = 1, **options: Any) -> Iterator[Machine]:
    """Enter a machine that is left without a hazard, and with nothing allocated or page-locked."""
    with pretend_cuda(devices, **options) as made:
        yield made
        gc.collect()
        assert made.hazards == []
        assert (sum(made.allocated), made.locked) == (0, {})


def on_devices(made: Machine) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", index) for index in range(made.devices))


@contextmanager
def offloading(
    made: Machine, model: OffloadedModel, policy: Policy, slots: int, chunk_bytes: int = 1024
) -> Iterator[LiveRuntime]:
    """Enter a runtime with `slots` on each device, all of which are still at something else."""
    devices = on_devices(made)
    testbed = Testbed("pretended", "measured", devices, chunk_bytes)
    busy = [torch.zeros(8, device=one) for one in devices]
    each, nbytes = (slots,) * made.devices, model.store.layout.nbytes
    with offloading_runtime(model, policy, testbed, each, nbytes) as runtime:
        yield runtime
    assert len(busy) == made.devices
    runtime.residency.cache.check_integrity()


def on_cuda(family: str = "mixtral") -> OffloadedModel:
    return OffloadedModel.from_model(small_model(family), torch.device("cuda", 0))


# What runs rightly --------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("devices", "family"), [(1, "mixtral"), (6, "qwen2_moe")])
def test_every_system_serves_the_same_logits_in_order(
    system: str, devices: int, family: str
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
        with offloading(made, model, policy, slots) as runtime:
            assert all(map(torch.equal, logits_on(runtime), logits))
        assert made.kernels["mm"] > 0
        del model, policy, runtime


class LaterLayers(OnDemandPolicy):
    """Asks for all experts but those of the first layer, before its gate speaks."""

    placement = Placement(prediction="critical_path")

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities:
        later = np.arange(self.shape.layers) > 0
        return np.tile(later[:, None].astype(float), self.shape.experts)


@pytest.mark.parametrize("devices", [1, 2])
def test_on_demand_loads_preempt_prefetches(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links have begun a prefetch when the first gate speaks, and go on when it has spoken."""
    start, begun = CudaLink.start, dict[torch.device, list[bool]]()
    prefetching, spoke = threading.Barrier(devices + 1, timeout=60), threading.Event()

    def started(link: CudaLink, chunk: Chunk) -> None:
        urgent = begun.setdefault(link._device, [])
        urgent.append(chunk.urgent)
        if len(urgent) == 1:
            prefetching.wait()
            spoke.wait()
        start(link, chunk)

    def speaks(*_: object) -> None:
        if not spoke.is_set():
            prefetching.wait()

    with machine(devices) as made:
        model = on_cuda()
        policy = LaterLayers(model.shape)
        monkeypatch.setattr(CudaLink, "start", started)
        with (
            model.gates[0].register_forward_pre_hook(speaks),
            offloading(made, model, policy, 2) as runtime,
        ):
            runtime.listeners.append(lambda outcome: spoke.set())
            assert all(map(torch.equal, logits_on(runtime), expected("mixtral")[0]))
        assert [urgent[:2] for urgent in begun.values()] == [[False, True]] * devices
        del model, policy, runtime


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that run.py serves a saved model of 3 layers with."""
    weights = saved_mixtral(tmp_path_factory.mktemp("tiny") / "model", 3)
    facts = {"layers": 3, "experts": 4, "hidden_size": 16, "expert_intermediate_size": 16}
    told = [f"model.{name}={value}" for name, value in facts.items()]
    return [f"weights='{weights}'", *told, "testbed=local", "testbed.chunk_mb=0.1"]


OFFLINE = (
    *("workload.prompts=4", "workload.history_share=0.5", "workload.output_tokens=3"),
    *("workload.input_tokens=8", "workload.batch_size=2", "workload.repeats=2"),
    *("timeline=true", "record=true"),
)
ONLINE = (
    *("workload=online", "workload.requests=4", "workload.rate=1000", "workload.max_batch_size=2"),
    *("workload.max_input_tokens=8", "workload.max_output_tokens=3"),
)


@pytest.mark.parametrize("workload", [OFFLINE, ONLINE], ids=["offline", "online"])
@pytest.mark.parametrize("devices", [1, 6])
def test_a_run_leaves_a_complete_measured_lossless_record(
    workload: tuple[str, ...], devices: int, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *workload, "memory_budget=50%", f"output='{tmp_path}'"]
    with machine(devices):
        record = run(config("config", *words), Console())
    assert (record["status"], record["mode"]) == ("complete", "measured")
    assert record["testbed"].startswith(f"{devices} x Pretended GPU")
    assert record["summary"]["lossless"] is True
    assert record["summary"]["hits"] + record["summary"]["misses"] > 0
    assert len(pd.read_parquet(tmp_path / "requests.parquet")) == 4
    if workload is OFFLINE:
        assert (tmp_path / "timeline.json").exists()
        assert (tmp_path / "trace.parquet").exists()


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


# What cannot be -----------------------------------------------------------------------------------


def dense_bytes(cfg: DictConfig) -> int:
    """Return what a device has allocated once a model is loaded."""
    with machine() as roomy:
        model = load_model(cfg.model, cfg.weights, torch.device("cuda", 0), cfg.seed)
        dense = roomy.allocated[0]
        del model
    return dense


def test_a_budget_beyond_a_device_s_memory_is_refused(tiny: list[str], tmp_path: Path) -> None:
    cfg = config("config", *tiny, *OFFLINE, "system=resident", f"output='{tmp_path}'")
    dense = dense_bytes(cfg)
    room = "on cuda:0, which has 0.0 GB free"
    with machine(memory=dense + 4096), pytest.raises(UserError, match=room):
        run(cfg, Console())


def test_a_device_that_runs_out_of_memory_is_told_in_one_line(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("config", *tiny, *OFFLINE, "memory_budget=50%", f"output='{tmp_path}'")
    dense = dense_bytes(cfg)
    monkeypatch.setattr(live, "shortage", lambda *_: "")
    with machine(memory=dense + 40_000), pytest.raises(UserError, match=r"out of memory.*; lower"):
        run(cfg, Console())


def test_memory_that_cannot_be_page_locked_is_an_error() -> None:
    with machine(lockable=10_000), pytest.raises(MemoryError, match="refuses to page-lock"):
        on_cuda()


# What would be wrong ------------------------------------------------------------------------------


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

    def hasty(link: CudaLink, *given: Any) -> None:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(Stream, "wait_stream", lambda stream, other: None)
            within.setattr(Event, "synchronize", lambda event: None)
            make(link, *given)

    patch.setattr(CudaLink, "__init__", hasty)


@pytest.mark.parametrize(
    "broken",
    [
        *(no_guard, readers_ignored, told_early, guarded_early),
        *(not_locked, unlocked_early, slots_not_awaited),
    ],
)
def test_what_is_broken_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_cuda(2) as made:
        broken(monkeypatch)
        model = on_cuda()
        with offloading(made, model, OnDemandPolicy(model.shape), slots=1) as runtime:
            logits_on(runtime)
        del model, runtime
        gc.collect()
    assert made.hazards != []


def test_a_choice_of_experts_that_is_read_too_early_is_poison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device.HostCopy, "read", lambda copy: copy._copies)
    with pretend_cuda() as made:
        model = on_cuda()
        with (
            pytest.raises(ValueError, match="negative"),
            offloading(made, model, OnDemandPolicy(model.shape), slots=2) as runtime,
        ):
            logits_on(runtime)
        del model, runtime
        gc.collect()


# What the machine itself finds --------------------------------------------------------------------


def unordered_read(there: torch.cuda.Stream) -> None:
    made = torch.ones(8, device=there.device)
    with torch.cuda.stream(there):
        made.clone()


def unordered_write(there: torch.cuda.Stream) -> None:
    made = torch.ones(8, device=there.device)
    torch.cuda.synchronize()
    made.clone()
    with torch.cuda.stream(there):
        made[2:].fill_(0)


def freed_under_a_stream(there: torch.cuda.Stream) -> None:
    made = torch.ones(8, device=there.device)
    there.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(there):
        made.mul_(2)


def pageable_copy(there: torch.cuda.Stream) -> None:
    torch.ones(8).to(there.device, non_blocking=True)


def source_rewritten(there: torch.cuda.Stream) -> None:
    source = torch.ones(8).pin_memory()
    source.to(there.device, non_blocking=True)
    source.zero_()
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (unordered_read, "clone .* reads 0:32 of memory .* not ordered after ones"),
        (unordered_write, "fill_ .* writes 8:32 of memory .* not ordered after clone"),
        (freed_under_a_stream, "is freed under mul_"),
        (pageable_copy, "asynchronous copy of host memory that is not page-locked"),
        (source_rewritten, "host memory is written before a copy from it"),
    ],
)
def test_a_hazard_is_found(wrong: Callable[[torch.cuda.Stream], None], found: str) -> None:
    with pretend_cuda() as made:
        wrong(torch.cuda.Stream(0))
    assert re.search(found, made.hazards[0])


def test_what_is_ordered_is_no_hazard() -> None:
    with machine():
        there, ready = torch.cuda.Stream(0), torch.cuda.Event()
        one = torch.ones(8, device=there.device)
        ready.record()
        there.wait_event(ready)
        with torch.cuda.stream(there):
            one.mul_(2)
            ready.record()
        ready.synchronize()
        one.add_(1)
        with torch.cuda.stream(there):
            torch.zeros(8, device=there.device).record_stream(there)
        source = torch.ones(8).pin_memory()
        source.to(there.device, non_blocking=True)
        torch.cuda.synchronize()
        source.zero_()
        assert one.tolist() == [3] * 8
        del one, source


def test_a_copy_to_the_host_is_poison_until_it_is_known_to_be_done() -> None:
    with machine() as made:
        one, done = torch.arange(8, device="cuda:0"), torch.cuda.Event()
        host = torch.empty(16, dtype=torch.long, pin_memory=True)
        host[4:12].copy_(one, non_blocking=True)
        done.record()
        assert made.waits.total() == 0
        assert host[4:12].tolist() != list(range(8))
        while not done.query():
            pass
        assert host[4:12].tolist() == list(range(8))
        assert host.is_pinned()
        assert made.waits.total() == 0
        del host, one


def test_tensors_of_two_devices_do_not_mix() -> None:
    with machine(2), pytest.raises(RuntimeError, match=r"same device, .* cuda:0, cuda:1"):
        torch.ones(8, device="cuda:0") + torch.ones(8, device="cuda:1")


def test_what_the_host_waits_for_and_what_launches_nothing() -> None:
    with machine(launch_s=0.0) as made:
        one = torch.arange(6.0, device="cuda:0")
        made.reset()
        assert one[1:].view(5, 1).T.shape == (1, 5)
        assert (made.kernels.total(), made.waits.total()) == (0, 0)
        assert one.sum().item() == 15
        assert (made.kernels.total(), made.waits.total()) == (1, 1)
        made.reset()
        waits = bool(one[1]), one[one > 2], one.nonzero(), one.cpu(), one[torch.tensor([1])]
        assert made.waits.total() == len(waits)
        timed = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for event in timed:
            event.record()
            one.mul(2)
        assert timed[0].elapsed_time(timed[1]) == pytest.approx(made.kernel_s * 1e3)
        del one, waits


# What it costs ------------------------------------------------------------------------------------


def per_decode(made: Machine, runtime: Any, batch: int = 1) -> tuple[int, int]:
    """Return the kernels that a decode iteration launches, and how often it waits for a device."""
    backend, seen = LiveBackend(runtime), list[tuple[int, int]]()

    def count(_: Any) -> None:
        seen.append((made.kernels.total(), made.waits.total()))
        made.reset()

    made.reset()
    server = Server(backend, listeners=[count])
    list(server.serve(FixedBatches(requests(batch, 7, output=OUTPUT), batch)))
    return seen[-1]


def plain_on_cuda(family: str, experts: str = "grouped_mm") -> PlainRuntime:
    """Return what runs a model as `generate` does."""
    model: Any = small_model(family)
    model.set_experts_implementation(experts)
    return PlainRuntime(model.to("cuda:0"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("system", ["on_demand", "finemoe"])
def test_a_decode_waits_for_its_token_and_for_layers_that_may_miss(
    family: str, system: str
) -> None:
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
        # An expert: two products, activation (2), weighing (2) and sum; grouped ones: 21 a layer.
        assert kernels <= generating[0] + layers * (7 * model.shape.top_k - 13)
        assert waits <= 1 + layers
        del model, policy, runtime


def test_without_grouped_kernels_that_need_no_host_experts_compute_one_by_one() -> None:
    logits, _ = expected("mixtral")
    with machine(capability=(8, 6)) as made:
        model = on_cuda()
        with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
            assert not runtime.grouped
            assert all(map(torch.equal, logits_on(runtime), logits))
        assert made.kernels["_grouped_mm"] == 0
        del model, runtime


def test_with_them_all_that_is_resident_equals_the_grouped_model() -> None:
    with machine() as made:
        plain = logits_on(plain_on_cuda("qwen2_moe"))
        model = on_cuda("qwen2_moe")
        policy = OnDemandPolicy(model.shape)
        with offloading(made, model, policy, model.shape.size) as runtime:
            assert runtime.grouped
            assert all(map(torch.equal, logits_on(runtime), plain))
        del model, policy, runtime


def test_devices_compute_their_experts_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ExpertKernel.__call__
    with machine(6) as made:

        def slow(kernel: ExpertKernel, rows: Tensor, weights: Any) -> Tensor:
            made.kernel_s, before = 1.0, made.kernel_s
            output = call(kernel, rows, weights)
            made.kernel_s = before
            return output

        monkeypatch.setattr(ExpertKernel, "__call__", slow)
        model = on_cuda("olmoe")
        each = model.shape.size // made.devices
        with offloading(made, model, OnDemandPolicy(model.shape), each) as runtime:
            made.reset()
            serve(runtime, requests(3, 7, output=1))
        spans = sorted((begin, end) for _, _, begin, end in made.spans if end - begin > 0.5)
        del model, runtime
    computing, until = 0.0, 0.0
    for begin, end in spans:
        computing += max(0.0, end - max(begin, until))
        until = max(until, end)
    assert computing < 0.5 * len(spans)
