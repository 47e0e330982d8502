"""Live runtimes: what an engine is made of, for a model on a testbed."""

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
    grouped = len(devices) == 1 and residency.holds_everything and _grouped_is_faster(model)
    places = (model, policy, residency, memory, links, devices)
    return LiveRuntime(*places, timeline, testbed.cores, grouped)


def resident_runtime(model: OffloadedModel, policy: Policy, grouped: bool = True) -> LiveRuntime:
    """Return a runtime with every expert on the model's device; a CPU uses them where they lie.

    Without `grouped` it computes expert by expert, as under a budget, to the last bit.
    """
    layout, devices = model.store.layout, (model.device,)
    plan = MemoryPlan((model.shape.size,), layout.nbytes, layout.nbytes)
    residency = Residency(model.shape, plan, policy)
    if model.device.type == "cuda":
        memory = DeviceSlots.allocate(layout, plan.slots, devices)
        _fill(memory, residency, model)
    else:
        slot = residency.cache.slot
        by_slot = sorted(residency.preload(), key=lambda flat: slot(flat).index)
        memory = DeviceSlots(layout, [[model.store.blocks[flat] for flat in by_slot]])
    grouped = grouped and _grouped_is_faster(model)
    return LiveRuntime(model, policy, residency, memory, (), devices, grouped=grouped)


def _grouped_is_faster(model: OffloadedModel) -> bool:
    dtype = model.store.layout.fields[0][2]
    return not grouped_mm_waits(model.device, dtype)


def _fill(memory: DeviceSlots, residency: Residency, model: OffloadedModel) -> None:
    for flat in residency.preload():
        memory.block(residency.cache.slot(flat)).copy_(model.store.blocks[flat])
