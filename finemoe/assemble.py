"""Live runtimes: what an engine is made of, for a model on a testbed."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from finemoe.offload.budget import spread
from finemoe.offload.device import CudaLink, DeviceSlots, EmulatedLink, Link
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel, grouped_mm_waits
from finemoe.offload.policy import Machine, Policy
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.timeline import Timeline
from finemoe.testbed import Testbed

MANY, TIMES = 16, 5  # tokens and calls that kernels are timed with


def offloading_runtime(
    model: OffloadedModel,
    policy: Policy,
    testbed: Testbed,
    slots: tuple[int, ...],
    full_expert_bytes: int,
    timeline: Timeline | None = None,
    protect: bool = False,
) -> LiveRuntime:
    """Return a runtime with links to `slots` (per device), which are filled if they hold all."""
    layout, devices = model.store.layout, testbed.devices
    # Equal ones, none of which is but the rest.
    chunks = max(1, round(full_expert_bytes / testbed.chunk_bytes))
    plan = MemoryPlan(slots, layout.nbytes, -(-layout.nbytes // chunks), protect)
    residency = Residency(model.shape, plan, policy)
    memory = DeviceSlots.allocate(layout, slots, devices)
    if residency.holds_everything:
        _fill(memory, residency, model)
    links: list[Link] = []
    for device in devices:
        if device.type == "cuda":
            links.append(CudaLink(model.store, memory, device, timed=timeline is not None))
        else:
            seconds = full_expert_bytes / (testbed.link_gb_s * 1e9) * testbed.time_scale
            latency = testbed.link_latency_s * testbed.time_scale
            links.append(EmulatedLink(model.store, memory, layout.nbytes / seconds, latency))
    grouped = residency.holds_everything and _grouped_is_faster(model, devices)
    places = (model, policy, residency, memory, links, devices)
    return LiveRuntime(*places, timeline, testbed.cores, grouped)


def measured_machine(
    model: OffloadedModel, testbed: Testbed, slots: tuple[int, ...], full_expert_bytes: int
) -> Machine:
    """Time an expert's kernel on host and device, and a copy: the least of a few, as lines.

    An emulated link takes its nominal time, and the host is the device as well.
    """
    device, store, kernel = testbed.devices[0], model.store, model.kernels[0]
    weights = store.layout.views(store.blocks[0])
    on_host = _line(lambda rows: kernel(rows, weights), model, torch.device("cpu"))
    if device.type != "cuda":
        return Machine(slots, testbed.load_seconds(full_expert_bytes), on_host, on_host)
    block = torch.empty(store.layout.nbytes, dtype=torch.uint8, device=device)
    load = _least_seconds(lambda: block.copy_(store.blocks[0], non_blocking=True), device)
    there = store.layout.views(block)
    return Machine(slots, load, on_host, _line(lambda rows: kernel(rows, there), model, device))


def _line(
    run: Callable[[Tensor], object], model: OffloadedModel, device: torch.device
) -> Callable[[int], float]:
    """Return the seconds by tokens, a line through what 1 and MANY of them take."""
    dtype, hidden = model.store.layout.fields[0][2], model.shape.hidden_size
    one, many = (
        _least_seconds(partial(run, torch.zeros(count, hidden, dtype=dtype, device=device)), device)
        for count in (1, MANY)
    )
    more = max(0.0, many - one) / (MANY - 1)
    return lambda tokens: one + (tokens - 1) * more


@torch.inference_mode()
def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def resident_runtime(
    model: OffloadedModel,
    policy: Policy,
    devices: Sequence[torch.device] = (),
    grouped: bool = True,
) -> LiveRuntime:
    """Return a runtime with every expert on one of `devices`, by default on the model's own.

    Each is on the device that it has under a budget. A CPU uses them where they lie. Without
    `grouped` experts compute one by one, as under a budget, to the last bit.
    """
    layout, devices = model.store.layout, tuple(devices) or (model.device,)
    slots = spread(model.shape, len(devices))
    residency = Residency(model.shape, MemoryPlan(slots, layout.nbytes, layout.nbytes), policy)
    if model.device.type == "cuda":
        memory = DeviceSlots.allocate(layout, slots, devices)
        _fill(memory, residency, model)
    else:
        # Each takes the next slot of its device.
        residency.preload()
        blocks = [model.store.blocks[device :: len(slots)] for device in range(len(slots))]
        memory = DeviceSlots(layout, blocks)
    grouped = grouped and _grouped_is_faster(model, devices)
    return LiveRuntime(model, policy, residency, memory, (), devices, grouped=grouped)


def _grouped_is_faster(model: OffloadedModel, devices: Sequence[torch.device]) -> bool:
    dtype = model.store.layout.fields[0][2]
    return len(devices) == 1 and not grouped_mm_waits(model.device, dtype)


def _fill(memory: DeviceSlots, residency: Residency, model: OffloadedModel) -> None:
    for flat in residency.preload():
        memory.block(residency.cache.slot(flat)).copy_(model.store.blocks[flat])
