"""Live runtimes: what an engine is made of, for a model on a testbed."""

from collections.abc import Sequence

import torch

from finemoe.offload.budget import spread
from finemoe.offload.cache import Slot
from finemoe.offload.device import CudaLink, DeviceSlots, EmulatedLink, Link
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel, grouped_mm_waits
from finemoe.offload.policy import Policy
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.timeline import Timeline
from finemoe.testbed import Testbed


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
    chunks = -(-full_expert_bytes // testbed.chunk_bytes)
    plan = MemoryPlan(slots, layout.nbytes, -(-layout.nbytes // chunks), protect)
    residency = Residency(model.shape, plan, policy)
    memory = DeviceSlots.allocate(layout, slots, devices)
    if residency.holds_everything:
        _fill(memory, residency, model)
    links: list[Link] = []
    for device in devices:
        if device.type == "cuda":
            links.append(CudaLink(model.store, memory, device))
        else:
            seconds = full_expert_bytes / (testbed.link_gb_s * 1e9) * testbed.time_scale
            latency = testbed.link_latency_s * testbed.time_scale
            links.append(EmulatedLink(model.store, memory, layout.nbytes / seconds, latency))
    grouped = residency.holds_everything and _grouped_is_faster(model, devices)
    places = (model, policy, residency, memory, links, devices)
    return LiveRuntime(*places, timeline, testbed.cores, grouped)


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
        blocks = {
            residency.cache.slot(flat): model.store.blocks[flat] for flat in residency.preload()
        }
        rows = [[blocks[Slot(d, i)] for i in range(count)] for d, count in enumerate(slots)]
        memory = DeviceSlots(layout, rows)
    grouped = grouped and _grouped_is_faster(model, devices)
    return LiveRuntime(model, policy, residency, memory, (), devices, grouped=grouped)


def _grouped_is_faster(model: OffloadedModel, devices: Sequence[torch.device]) -> bool:
    dtype = model.store.layout.fields[0][2]
    return len(devices) == 1 and not grouped_mm_waits(model.device, dtype)


def _fill(memory: DeviceSlots, residency: Residency, model: OffloadedModel) -> None:
    for flat in residency.preload():
        memory.block(residency.cache.slot(flat)).copy_(model.store.blocks[flat])
