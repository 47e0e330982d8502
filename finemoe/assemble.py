"""Put a live runtime together: slots, links and residency for a model on a testbed."""

from __future__ import annotations

from finemoe.offload.experts import DeviceSlots, ExpertMemory, HostMemory
from finemoe.offload.links import CudaLink, EmulatedLink, Link, LinkSpeed
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
) -> LiveRuntime:
    """Return a runtime whose experts live in `slots` (per device) and arrive over links.

    A budget that holds every expert is filled before serving begins.
    """
    stored = model.store.layout.nbytes
    chunks = -(-full_expert_bytes // testbed.chunk_bytes)
    residency = Residency(model.shape, MemoryPlan(slots, stored, -(-stored // chunks)), policy)
    memory = DeviceSlots(model.store, slots, testbed.devices)
    links: list[Link] = []
    for device in testbed.devices:
        if device.type == "cuda":
            links.append(CudaLink(model.store, memory, device))
        else:
            speed = _paced(testbed, stored, full_expert_bytes)
            links.append(EmulatedLink(model.store, memory, speed))
    if residency.holds_everything:
        for place in residency.preload():
            memory.block(residency.cache.slot(place)).copy_(model.store.block(place))
    return LiveRuntime(
        model, policy, residency, memory, links, testbed.devices, timeline, testbed.cores
    )


def resident_runtime(model: OffloadedModel, policy: Policy) -> LiveRuntime:
    """Return a runtime with every expert resident on the model's own device.

    On the CPU experts are used where they lie; elsewhere they are copied into slots first.
    """
    experts = model.shape.layers * model.shape.experts
    stored = model.store.layout.nbytes
    residency = Residency(model.shape, MemoryPlan((experts,), stored, stored), policy)
    loaded = residency.preload()
    memory: ExpertMemory = HostMemory(model.store)
    if model.device.type == "cuda":
        slots = DeviceSlots(model.store, (experts,), (model.device,))
        for place in loaded:
            slots.block(residency.cache.slot(place)).copy_(model.store.block(place))
        memory = slots
    return LiveRuntime(model, policy, residency, memory, (), (model.device,))


def _paced(testbed: Testbed, stored: int, full_expert_bytes: int) -> LinkSpeed:
    copying = full_expert_bytes / (testbed.link_gb_s * 1e9) * testbed.time_scale
    return LinkSpeed(stored / copying, testbed.link_latency_s * testbed.time_scale)
