"""Live runtimes: what an engine is made of, for a model on a testbed."""

from collections.abc import Sequence

import torch

from finemoe.offload.budget import spread
from finemoe.offload.cache import Slot
from finemoe.offload.device import CudaLink, DeviceSlots, EmulatedLink, Link
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
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
    return LiveRuntime(model, policy, residency, memory, links, devices, timeline, testbed.cores)


def resident_runtime(
    model: OffloadedModel, policy: Policy, devices: Sequence[torch.device] = ()
) -> LiveRuntime:
    """Return a runtime with every expert on one of `devices`, by default on the model's own.

    Each is on the device that it has under a budget. A CPU uses them where they lie.
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
    return LiveRuntime(model, policy, residency, memory, (), devices)


def _fill(memory: DeviceSlots, residency: Residency, model: OffloadedModel) -> None:
    for flat in residency.preload():
        memory.block(residency.cache.slot(flat)).copy_(model.store.blocks[flat])
