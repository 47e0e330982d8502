"""Check the engine on a CUDA device: python -m experiments.bench.gpu.

Every part runs even if another fails; the results file holds what was measured and what failed.
"""

from __future__ import annotations

import gc
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from baselines.on_demand import OnDemandPolicy
from experiments.bench.overheads import (
    SCALE_MODEL,
    Check,
    Load,
    parsed,
    print_checks,
    request,
    resident_overheads,
    scale_model,
    two_policies,
    write_json,
)
from experiments.errors import command
from experiments.run.metrics import AccessCounter
from experiments.run.records import provenance
from experiments.run.serving import Server
from experiments.run.small_models import FAMILIES, small_model
from experiments.run.workloads import Request
from finemoe.assemble import offloading_runtime
from finemoe.offload.budget import GB, plan_slots
from finemoe.offload.cache import Slot
from finemoe.offload.device import (
    BlockLayout,
    CudaLink,
    DeviceSlots,
    EmulatedLink,
    HostStore,
    Link,
    host_block,
)
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import ModelShape, Policy
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.testbed import Testbed

RESULTS = Path("results/gpu")
CPU_LINK_GB_S = 1.0
"""Rate of the emulated link that stands in when the parts run on the CPU."""


@dataclass(frozen=True)
class FullModel:
    """An architecture by the defaults of its config, with `changes`; d is the paper's."""

    family: str
    distance: int
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How large the parts are; the defaults are those of the paper's models."""

    expert_bytes: int = 352_321_536
    """One expert of Mixtral-8x7B in bf16."""
    chunk_bytes: int = 32_000_000
    copies: int = 12
    """Experts copied in one sample of a rate."""
    samples: int = 5
    matrix: int = 4096
    """Rows of the square bf16 matrices that stand for compute."""
    scale: Path = SCALE_MODEL
    load: Load = field(default_factory=Load)
    budget_gb: float = 12.0
    full_load: Load = field(default_factory=lambda: Load(new_tokens=6))
    full_models: tuple[FullModel, ...] = (FullModel("mixtral", 3), FullModel("qwen2_moe", 6))


# (a) Losslessness -------------------------------------------------------------------------------


def lossless(device: torch.device, sizes: Sizes) -> list[Check]:
    """Compare logits at the smallest budget and at half with eager experts on the device."""
    checks = []
    asked = request(0, Load(prompt_tokens=7, new_tokens=5), vocabulary=128)
    for family in FAMILIES:
        plain: Any = small_model(family)
        expected = _plain_logits(plain.to(device), asked)
        model = OffloadedModel.from_model(small_model(family), device)
        shape = model.shape
        for name, slots in (("smallest", shape.top_k), ("half", shape.layers * shape.experts // 2)):
            found = [
                _offloaded_logits(model, policy, slots, asked, device)
                for policy in two_policies(model, distance=1).values()
            ]
            equal = all(
                torch.equal(a, b) for logits in found for a, b in zip(expected, logits, strict=True)
            )
            checks.append(Check(f"{family}: logits equal, {name} budget", float(equal), at_least=1))
    return checks


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, asked: Request) -> list[Tensor]:
    logits: list[Tensor] = []
    tokens, cache = torch.tensor([asked.prompt], device=model.device), None
    for _ in range(asked.output_tokens):
        output: Any = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1)
        cache = output.cache
        logits.append(output.logits[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
    return logits


def _offloaded_logits(
    model: OffloadedModel, policy: Policy, slots: int, asked: Request, device: torch.device
) -> list[Tensor]:
    nbytes = model.store.layout.nbytes
    with offloading_runtime(model, policy, _testbed(device, 1024), (slots,), nbytes) as runtime:
        server = Server(runtime)
        server.serve([asked])
    return server.logits


def _testbed(device: torch.device, chunk_bytes: int) -> Testbed:
    if device.type == "cuda":
        return Testbed("local", "measured", (device,), chunk_bytes)
    return Testbed("stand-in", "emulated", (device,), chunk_bytes, link_gb_s=CPU_LINK_GB_S)


# (b) The link's rate ----------------------------------------------------------------------------


class CopyRig:
    """Experts of one size on the host, two slots on the device, and the link between them."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        pin = device.type == "cuda"
        blocks = [host_block(sizes.expert_bytes, pin).fill_(1) for _ in range(2)]
        store = HostStore(
            BlockLayout((), sizes.expert_bytes),
            [blocks[place % 2] for place in range(sizes.copies)],
            pinned=pin,
        )
        self._slots = DeviceSlots.allocate(store.layout, (2,), (device,))
        self._store = store
        self._sizes = sizes
        self._device = device

    @property
    def nbytes(self) -> int:
        """Bytes that `drive` and `memcpy` copy."""
        return self._sizes.expert_bytes * self._sizes.copies

    def drive(self) -> None:
        """Copy every expert through a transfer queue and the link, as a runtime's thread does."""
        shape = ModelShape(1, self._sizes.copies, 1, 1)
        plan = MemoryPlan((2,), self._sizes.expert_bytes, self._sizes.chunk_bytes)
        queue = Residency(shape, plan, OnDemandPolicy(shape)).queues[0]
        link = self._link()
        for place in range(self._sizes.copies):
            queue.demand(place)
        in_flight: deque[Any] = deque()
        while (chunk := queue.next_chunk()) is not None or in_flight:
            if chunk is not None:
                link.start(chunk)
                in_flight.append(chunk)
            if chunk is None or len(in_flight) == link.depth:
                link.finish()
                queue.chunk_done(in_flight.popleft())

    def memcpy(self) -> None:
        """Copy as many bytes with one plain copy an expert."""
        for place in range(self._sizes.copies):
            target = self._slots.block(Slot(0, place % 2))
            target.copy_(self._store.blocks[place], non_blocking=True)
        _wait(self._device)

    def _link(self) -> Link:
        if self._device.type == "cuda":
            return CudaLink(self._store, self._slots, self._device)
        return EmulatedLink(self._store, self._slots, float("inf"), 0.0)


def rate(device: torch.device, sizes: Sizes) -> list[Check]:
    """Compare the link, driven through its queue, with plain copies of the same bytes."""
    rig = CopyRig(device, sizes)
    for way in (rig.drive, rig.memcpy):
        way()
    pairs = [
        (_seconds(rig.drive, device), _seconds(rig.memcpy, device)) for _ in range(sizes.samples)
    ]
    ratio = statistics.median(plain / link for link, plain in pairs)
    link, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return [
        Check("link rate / plain copy rate", ratio, at_least=0.95),
        Check("link rate", rig.nbytes / link / GB, "GB/s"),
        Check("plain copy rate", rig.nbytes / plain / GB, "GB/s"),
    ]


# (c) Overlap ------------------------------------------------------------------------------------


def overlap(device: torch.device, sizes: Sizes) -> list[Check]:
    """Run compute alone, copies alone and both at once; 1 is perfect overlap, 0 is none."""
    rig = CopyRig(device, sizes)
    matrix = torch.ones(sizes.matrix, sizes.matrix, dtype=torch.bfloat16, device=device)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)
        _wait(device)

    def both(times: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            copying = pool.submit(rig.drive)
            compute(times)
            copying.result()

    compute(1)
    rig.drive()
    copy = _seconds(rig.drive, device)
    times = max(1, round(10 * copy / _seconds(lambda: compute(10), device)))
    samples = []
    for _ in range(sizes.samples):
        alone = _seconds(lambda: compute(times), device)
        copy = _seconds(rig.drive, device)
        together = _seconds(lambda: both(times), device)
        samples.append((alone, copy, together, (alone + copy - together) / min(alone, copy)))
    names = ("compute alone", "copy alone", "both at once")
    medians = [statistics.median(column) for column in zip(*samples, strict=True)]
    seconds = zip(names, medians, strict=False)
    return [
        Check("overlap", medians[-1]),
        *(Check(name, value * 1e3, "ms") for name, value in seconds),
        *_small_copies(rig, device),
    ]


def _small_copies(rig: CopyRig, device: torch.device) -> list[Check]:
    """Return how long one token index takes to the device, with the link idle and busy."""
    index = torch.zeros(1, dtype=torch.long)

    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def send() -> None:
        index.to(device)
        if stream is not None:
            stream.synchronize()

    idle = statistics.median(_elapsed(send) for _ in range(20))
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(rig.drive)
        waits = [_elapsed(send)]
        while not copying.done():
            waits.append(_elapsed(send))
        copying.result()
    return [
        Check("index to device, link idle", idle * 1e3, "ms"),
        Check("index to device, link busy", statistics.median(waits) * 1e3, "ms"),
    ]


# (d) Overheads, (e) full-size shapes ------------------------------------------------------------


def overheads(device: torch.device, sizes: Sizes) -> list[Check]:
    """Compare the engine with `generate`, everything resident, on the scale model."""
    return resident_overheads(lambda: scale_model(sizes.scale), device, sizes.load)


def full_size(device: torch.device, sizes: Sizes) -> list[Check]:
    """Serve full-size architectures with dummy weights under a fixed budget."""
    checks = []
    for full in sizes.full_models:
        checks += _serve_full_model(full, device, sizes)
        _release(device)
    return checks


def _serve_full_model(full: FullModel, device: torch.device, sizes: Sizes) -> list[Check]:
    with torch.device("meta"):
        config = AutoConfig.for_model(full.family, **full.changes)
        meta = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = OffloadedModel.from_meta(meta, device, seed=0)
    policies = two_policies(model, full.distance)
    checks = []
    for name, policy in policies.items():
        measured = _serve_with(model, policy, device, sizes)
        prefix = f"{full.family}, {name}"
        checks += [replace(check, name=f"{prefix}: {check.name}") for check in measured]
        _release(device)
    return checks


def _serve_with(
    model: OffloadedModel, policy: Policy, device: torch.device, sizes: Sizes
) -> list[Check]:
    """Serve one prompt that prepares the policy, then the measured one."""
    nbytes = model.store.layout.nbytes
    budget = round(sizes.budget_gb * GB)
    slots = plan_slots(budget, nbytes, model.shape, devices=1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    testbed = _testbed(device, sizes.chunk_bytes)
    runtime = offloading_runtime(model, policy, testbed, slots, nbytes)
    vocabulary = model.model.config.vocab_size
    accesses = AccessCounter()
    with runtime:
        server = Server(runtime)
        server.serve([request(0, sizes.full_load, vocabulary)])
        runtime.drain()
        runtime.listeners.append(accesses)
        served = server.serve([request(1, sizes.full_load, vocabulary)])[0]
    finite = all(bool(logits.isfinite().all()) for logits in server.logits)
    peak = runtime.residency.cache.peak_occupied * nbytes
    checks = [
        Check("logits finite", float(finite), at_least=1),
        Check("TTFT", served.ttft, "s"),
        Check("TPOT", served.tpot or 0.0, "s"),
        Check("peak slot bytes / budget", peak / budget, at_most=1),
        *(Check(name, getattr(accesses.total, name)) for name in ("hits", "late", "misses")),
    ]
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        checks.append(Check("peak memory allocated", allocated / GB, "GB"))
    return checks


# All parts --------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    """Give freed memory back, so that the next part starts as the first did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return how long some work takes, with nothing else under way before or after."""
    _wait(device)

    def whole() -> None:
        work()
        _wait(device)

    return _elapsed(whole)


def _elapsed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


Part = Callable[[torch.device, Sizes], list[Check]]

PARTS: dict[str, Part] = {
    "Lossless": lossless,
    "Link rate": rate,
    "Overlap": overlap,
    "Overheads": overheads,
    "Full size": full_size,
}


@dataclass(frozen=True)
class Outcome:
    """What one part measured, or the error that ended it."""

    checks: list[Check]
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and all(check.met is not False for check in self.checks)

    def plain(self) -> dict[str, Any]:
        checks = [check.plain() for check in self.checks]
        return {"passed": self.passed, "error": self.error, "checks": checks}


def run_parts(
    device: torch.device, sizes: Sizes, console: Console, parts: dict[str, Part] = PARTS
) -> dict[str, Outcome]:
    """Run every part, whatever becomes of the others, and print what each measured."""
    outcomes = {}
    for name, part in parts.items():
        try:
            outcome = Outcome(part(device, sizes))
        except Exception as error:
            outcome = Outcome([], f"{type(error).__name__}: {error}")
            console.print(f"{name} failed: {outcome.error}", style="red", markup=False)
        else:
            print_checks(name, outcome.checks, console)
        outcomes[name] = outcome
        _release(device)
    return outcomes


def write_results(folder: Path, hardware: str, outcomes: dict[str, Outcome]) -> Path:
    """Write everything measured, under the name of the hardware."""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"
    record = {
        "hardware": hardware,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "passed": all(outcome.passed for outcome in outcomes.values()),
        "parts": {name: outcome.plain() for name, outcome in outcomes.items()},
        **provenance(),
    }
    write_json(path, record)
    return path


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@command()
def main(arguments: list[str] | None = None) -> int:
    """Run the parts on the first CUDA device; return 0 if all passed, 1 if not, 2 without one."""
    output = RESULTS, "folder of the results"
    options = parsed("gpu_check", __doc__, arguments, output=output)
    if not torch.cuda.is_available():
        print(
            "no CUDA device is visible to torch; run this on a machine with one and a CUDA build "
            "of torch, or use `python -m experiments.bench` for the CPU",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", 0)
    outcomes = run_parts(device, Sizes(), Console())
    path = write_results(options.output, torch.cuda.get_device_name(device), outcomes)
    print(f"written to {path}")
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
