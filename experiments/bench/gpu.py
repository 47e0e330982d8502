"""Check the engine on a CUDA device: python -m experiments.bench.gpu.

Every part runs even if another fails; the results file holds what was measured and what failed.
"""

import gc
import math
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM

from baselines.on_demand import OnDemandPolicy
from experiments.bench import engine
from experiments.bench.engine import Check, Load, two_policies
from experiments.errors import UserError, command, options_given
from experiments.run.live import LiveBackend, LogitsLog, PlainRuntime
from experiments.run.metrics import AccessCounter
from experiments.run.records import provenance
from experiments.run.schedule import FixedBatches, Request, Server
from experiments.run.small_models import FAMILIES, small_model
from finemoe.assemble import offloading_runtime
from finemoe.files import write_json
from finemoe.offload import device as memory
from finemoe.offload.budget import GB, plan_slots
from finemoe.offload.cache import Slot
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import ModelShape, Policy
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.testbed import Testbed

OPTIONS = {"output": "results/gpu"}
CPU_LINK_GB_S = 1.0
"""Rate of the emulated link that stands in when the parts run on the CPU."""


@dataclass(frozen=True)
class Sizes:
    """How large the parts are; the defaults are those of the paper's models."""

    expert_bytes: int = engine.FULL_EXPERT_BYTES
    chunk_bytes: int = 32_000_000
    copies: int = 12
    """Experts copied in one sample of a rate."""
    seconds: float = 1.0
    """How long each piece of work is repeated to be timed."""
    matrix: int = 4096
    """Rows of the square bf16 matrices that stand for compute."""
    scale: Path = engine.SCALE_MODEL
    load: Load = field(default_factory=Load)
    budget_gb: float = 12.0
    full_load: Load = field(default_factory=lambda: Load(new_tokens=6))
    full_models: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("mixtral", 3, {}),
        ("qwen2_moe", 6, {}),
    )
    """Family, the paper's prefetch distance, and changes to the defaults of the config."""

    def timed(self, work: Callable[[], None]) -> float:
        """Return the median seconds of some work, the device idle before and after."""
        timer = Timer("work()", globals={"work": work})
        return timer.blocked_autorange(min_run_time=self.seconds).median


def lossless(device: torch.device, sizes: Sizes) -> list[Check]:
    """Compare logits at the smallest budget and at half with eager experts on the device."""
    checks = []
    for family in FAMILIES:
        model = OffloadedModel.from_model(small_model(family), device)
        request = Load(prompt_tokens=7, new_tokens=5).request(0, model)
        eager: Any = small_model(family)
        expected = _logits(PlainRuntime(eager.to(device)), request)
        nbytes, testbed = model.store.layout.nbytes, _testbed(device, 1024)
        for name, slots in (("smallest", model.shape.top_k), ("half", model.shape.size // 2)):
            equal = True
            for policy in two_policies(model, distance=1).values():
                with offloading_runtime(model, policy, testbed, (slots,), nbytes) as runtime:
                    equal &= torch.equal(_logits(runtime, request), expected)
            checks.append(Check(f"{family}: logits equal, {name} budget", float(equal), at_least=1))
    return checks


def _logits(runtime: Any, request: Request) -> Tensor:
    """Return the logits of every step, shape (steps, vocabulary)."""
    backend, log = LiveBackend(runtime), LogitsLog()
    server = Server(backend, listeners=[lambda step: log.keep(step, backend.logits)])
    list(server.serve(FixedBatches([request], 1)))
    return torch.cat(log.kept)


def _testbed(device: torch.device, chunk_bytes: int) -> Testbed:
    if device.type == "cuda":
        return Testbed("local", "measured", (device,), chunk_bytes)
    return Testbed("stand-in", "emulated", (device,), chunk_bytes, link_gb_s=CPU_LINK_GB_S)


def copies(device: torch.device, sizes: Sizes) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two ways to copy experts of one size into two slots of the device.

    Through a transfer queue and the link, as a runtime's thread does, and with one plain copy each.
    """
    pin = device.type == "cuda"
    blocks = [memory.host_block(sizes.expert_bytes, pin).fill_(1) for _ in range(2)]
    experts = [blocks[expert % 2] for expert in range(sizes.copies)]
    store = memory.HostStore(memory.BlockLayout((), sizes.expert_bytes), experts, pinned=pin)
    slots = memory.DeviceSlots.allocate(store.layout, (2,), (device,))
    shape = ModelShape(1, sizes.copies, 1, 1)
    plan = MemoryPlan((2,), sizes.expert_bytes, sizes.chunk_bytes)

    def drive() -> None:
        queue = Residency(shape, plan, OnDemandPolicy(shape)).queues[0]
        link: memory.Link = memory.EmulatedLink(store, slots, math.inf, 0.0)
        if pin:
            link = memory.CudaLink(store, slots, device)
        for expert in range(sizes.copies):
            queue.demand(expert)
        in_flight: deque[Any] = deque()
        while (chunk := queue.next_chunk()) is not None or in_flight:
            if chunk is not None:
                link.start(chunk)
                in_flight.append(chunk)
            if chunk is None or len(in_flight) == link.depth:
                link.finish()
                queue.chunk_done(in_flight.popleft())

    def memcpy() -> None:
        for expert in range(sizes.copies):
            slots.block(Slot(0, expert % 2)).copy_(store.blocks[expert], non_blocking=True)

    return drive, memcpy


def rate(device: torch.device, sizes: Sizes) -> list[Check]:
    """Compare the link, driven through its queue, with plain copies of the same bytes."""
    gigabytes = sizes.expert_bytes * sizes.copies / GB
    link, memcpy = map(sizes.timed, copies(device, sizes))
    return [
        Check("link rate / plain copy rate", memcpy / link, at_least=0.95),
        Check("link rate", gigabytes / link, "GB/s"),
        Check("plain copy rate", gigabytes / memcpy, "GB/s"),
    ]


def overlap(device: torch.device, sizes: Sizes) -> list[Check]:
    """Run compute alone, copies alone and both at once; 1 is perfect overlap, 0 is none."""
    drive, _ = copies(device, sizes)
    matrix = torch.ones(sizes.matrix, sizes.matrix, dtype=torch.bfloat16, device=device)
    times = 10

    def compute() -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    def both() -> None:
        with ThreadPoolExecutor(1) as pool:
            driven = pool.submit(drive)
            compute()
            driven.result()

    copying = sizes.timed(drive)
    # As long as the copies take.
    times = max(1, round(times * copying / sizes.timed(compute)))
    alone, together = sizes.timed(compute), sizes.timed(both)
    return [
        Check("overlap", (alone + copying - together) / min(alone, copying)),
        Check("compute alone", alone * 1e3, "ms"),
        Check("copy alone", copying * 1e3, "ms"),
        Check("both at once", together * 1e3, "ms"),
        *_small_copies(drive, device),
    ]


def _small_copies(drive: Callable[[], None], device: torch.device) -> list[Check]:
    """Return how long one token index takes to the device, with the link idle and busy."""
    index = torch.zeros(1, dtype=torch.long)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def send() -> float:
        # A Timer would wait for the link as well.
        start = time.perf_counter()
        index.to(device)
        if stream is not None:
            stream.synchronize()
        return time.perf_counter() - start

    idle = [send() for _ in range(20)]
    with ThreadPoolExecutor(1) as pool:
        driven = pool.submit(drive)
        busy = [send()]
        while not driven.done():
            busy.append(send())
        driven.result()
    return [
        Check("index to device, link idle", statistics.median(idle) * 1e3, "ms"),
        Check("index to device, link busy", statistics.median(busy) * 1e3, "ms"),
    ]


def full_size(device: torch.device, sizes: Sizes) -> list[Check]:
    """Serve full-size architectures with dummy weights under a fixed budget."""
    checks = []
    for family, distance, changes in sizes.full_models:
        config = AutoConfig.for_model(family, **changes)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = OffloadedModel.from_meta(model, device, seed=0)
        for name, policy in two_policies(model, distance).items():
            for check in _serve_with(model, policy, device, sizes):
                checks.append(replace(check, name=f"{family}, {name}: {check.name}"))
            _release(device)
        del model, policy
        _release(device)
    return checks


def _serve_with(
    model: OffloadedModel, policy: Policy, device: torch.device, sizes: Sizes
) -> list[Check]:
    """Serve one prompt that prepares the policy, then the measured one."""
    nbytes, budget = model.store.layout.nbytes, round(sizes.budget_gb * GB)
    slots = plan_slots(budget, nbytes, model.shape, devices=1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    testbed, accesses = _testbed(device, sizes.chunk_bytes), AccessCounter()
    with offloading_runtime(model, policy, testbed, slots, nbytes) as runtime:
        backend, log = LiveBackend(runtime), LogitsLog()
        server = Server(backend)
        list(server.serve(FixedBatches([sizes.full_load.request(0, model)], 1)))
        runtime.drain()
        runtime.listeners.append(accesses)
        server.listeners.append(lambda step: log.keep(step, backend.logits))
        (served,) = server.serve(FixedBatches([sizes.full_load.request(1, model)], 1))
    finite = all(bool(logits.isfinite().all()) for logits in log.kept)
    peak = runtime.residency.cache.peak_occupied * nbytes
    checks = [
        Check("logits finite", float(finite), at_least=1),
        Check("TTFT", served.ttft, "s"),
        Check("TPOT", served.tpot or 0.0, "s"),
        Check("peak slot bytes / budget", peak / budget, at_most=1),
        *(Check(name, count) for name, count in accesses.over(accesses.counts).items()),
    ]
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        checks.append(Check("peak memory allocated", allocated / GB, "GB"))
    return checks


Part = Callable[[torch.device, Sizes], list[Check]]
PARTS: dict[str, Part] = {
    "Lossless": lossless,
    "Link rate": rate,
    "Overlap": overlap,
    "Overheads": lambda device, sizes: engine.resident_overheads(sizes.scale, device, sizes.load),
    "Full size": full_size,
}


def run_parts(
    device: torch.device, sizes: Sizes, console: Console, parts: Mapping[str, Part] = PARTS
) -> dict[str, dict[str, Any]]:
    """Run every part, whatever becomes of the others, and print and return what each measured."""
    results = {}
    for name, part in parts.items():
        checks, cause = [], None
        try:
            checks = part(device, sizes)
            engine.print_checks(name, checks, console)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            console.print(f"{name} failed: {cause}", style="red", markup=False)
        passed = cause is None and all(check.met is not False for check in checks)
        measured = [check.as_dict() for check in checks]
        results[name] = {"passed": passed, "error": cause, "checks": measured}
        _release(device)
    return results


def _release(device: torch.device) -> None:
    """Give freed memory back, so that the next part starts as the first did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_results(folder: Path, hardware: str, parts: Mapping[str, dict[str, Any]]) -> bool:
    """Write everything measured, under the name of the hardware; return whether all passed."""
    name = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    passed = all(part["passed"] for part in parts.values())
    driver, query = None, ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with suppress(OSError, subprocess.CalledProcessError):
        driver = subprocess.check_output([*query, "--id=0"], text=True).strip()
    facts = {"hardware": hardware, "driver": driver, "cuda": torch.version.cuda}
    write_json(folder / f"{name}.json", {**facts, "passed": passed, "parts": parts, **provenance()})
    print(f"written to {folder / name}.json")
    return passed


@command()
def main(arguments: list[str] | None = None) -> None:
    """Run the parts on the first CUDA device; exit 1 if one failed, 2 without a device."""
    options = options_given(__doc__, OPTIONS, arguments)
    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is visible to torch; run this on a machine with one and a CUDA build "
            "of torch, or use `python -m experiments.bench` for the CPU"
        )
    device = torch.device("cuda", 0)
    parts = run_parts(device, Sizes(), Console())
    passed = write_results(Path(options["output"]), torch.cuda.get_device_name(device), parts)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
