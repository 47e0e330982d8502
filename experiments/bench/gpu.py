"""Check this machine's CUDA devices: ``python -m experiments.bench.gpu`` (docs/gpu.md)."""

import gc
import itertools
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from rich.console import Console as RichConsole
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from baselines.on_demand import OnDemandPolicy
from experiments import CONF
from experiments.bench import engine
from experiments.bench.engine import SCALE_MODEL, Check, measured, random_request, two_policies
from experiments.errors import UserError, command
from experiments.run.config import build, run_config
from experiments.run.console import Console
from experiments.run.live import LiveBackend, LogitsLog, PlainRuntime, serve
from experiments.run.models import FAMILIES, small_model
from experiments.run.protocol import ensure_record
from experiments.run.records import pack_runs, provenance
from experiments.run.routing import kept_trace
from experiments.run.schedule import FixedBatches, Request, Server
from experiments.validate.calibrate import write_testbed
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.costs import DENSE_KERNELS, EXPERT_KERNELS
from finemoe.files import write_json
from finemoe.offload import device as memory
from finemoe.offload.cache import Slot
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import ModelShape
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.testbed import Testbed

MB, GB = 1e6, 1e9
TESTBED = "testbed.yaml"
Facts = dict[str, Any]
MOST_OF_MEMORY = 0.8
HOST_ROWS = 64  # tokens that the host's arithmetic is measured with: it is given few
MOST_DEVIATION = 0.2  # largest acceptable, of a simulated TTFT or TPOT from the measured


@dataclass(frozen=True)
class Bench:
    """The devices, how large the parts are (conf/gpu.yaml), and where the results go."""

    cfg: DictConfig
    testbed: Testbed
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.testbed.devices[0]

    @property
    def expert_bytes(self) -> int:
        return round(self.cfg.sizes.expert_mb * MB)

    def matrix(self, device: torch.device) -> Tensor:
        rows = self.cfg.sizes.matrix
        return torch.ones(rows, rows, dtype=torch.bfloat16, device=device)

    def timed(self, work: Callable[[], object]) -> float:
        """Return the median seconds of some work, the device idle before and after."""
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=self.cfg.sizes.seconds).median


def machine(bench: Bench) -> list[Check]:
    """Say what the devices are, and whether torch has kernels for them."""
    checks, built = list[Check](), torch.cuda.get_arch_list()
    for device in bench.testbed.devices:
        major, minor = torch.cuda.get_device_capability(device)
        # Code of the same major version runs on every later minor one.
        fits = any(re.fullmatch(rf"(sm|compute)_{major}\d", one) for one in built)
        room = torch.cuda.mem_get_info(device)
        checks += [
            measured(f"{device}: kernels for capability {major}.{minor}", fits, at_least=1),
            measured(f"{device}: memory", room[1] / GB, "GB"),
            measured(f"{device}: of which free", room[0] / room[1], at_least=0.9),
        ]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [*checks, measured("host memory", host / GB, "GB")]


def lossless(bench: Bench) -> list[Check]:
    """Compare logits, at the smallest budget and at half, with eager experts on the device."""
    checks = []
    for family in FAMILIES:
        model = OffloadedModel.from_model(small_model(family), bench.device)
        nbytes, request = model.store.layout.nbytes, random_request(0, model, new=5, prompt=7)
        eager: Any = small_model(family)
        expected = _logits(PlainRuntime(eager.to(bench.device)), request)
        budgets = {"smallest": model.shape.top_k, "half": model.shape.size // 2}
        counts = sorted({1, len(bench.testbed.devices)})
        for count, (budget, slots) in itertools.product(counts, budgets.items()):
            each, devices = (-(-slots // count),) * count, bench.testbed.devices[:count]
            testbed, equal = Testbed("few", "measured", devices, nbytes // 3), True
            for policy in two_policies(model, distance=1).values():
                with offloading_runtime(model, policy, testbed, each, nbytes) as runtime:
                    equal &= torch.equal(_logits(runtime, request), expected)
            name = f"{family}: logits equal, {budget} budget, {count} device(s)"
            checks.append(measured(name, equal, at_least=1))
    return checks


def _logits(runtime: Any, request: Request) -> Tensor:
    """Return the logits of every step, shape (steps, vocabulary)."""
    backend, log = LiveBackend(runtime), LogitsLog()
    server = Server(backend, listeners=[lambda step: log.keep(step, backend.logits)])
    list(server.serve(FixedBatches([request], 1)))
    return torch.cat(log.kept)


def copies(bench: Bench, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return how to copy experts into two slots of a device by queue and link, and plainly."""
    size, count = bench.expert_bytes, bench.cfg.sizes.copies
    layout = memory.BlockLayout((), size)
    blocks = [memory.host_block(size, pin=True).fill_(1) for _ in range(2)]
    store = memory.HostStore(layout, [blocks[n % 2] for n in range(count)], pinned=True)
    slots = memory.DeviceSlots.allocate(layout, (2,), (device,))
    shape = ModelShape(1, count, 1, 1)
    plan = MemoryPlan((2,), size, bench.testbed.chunk_bytes)

    def drive() -> None:
        residency = Residency(shape, plan, OnDemandPolicy(shape))
        link = memory.CudaLink(store, slots, device)
        # As a prefetch, whose chunks give way.
        residency.prefetch(0, np.ones((1, count)), OnDemandPolicy(shape).on_gate)
        in_flight: deque[Any] = deque()
        while (chunk := residency.next_chunk(0)) is not None or in_flight:
            if chunk is not None:
                link.start(chunk)
                in_flight.append(chunk)
            if chunk is None or len(in_flight) == link.depth:
                link.finish()
                residency.chunk_done(0, in_flight.popleft())

    def memcpy() -> None:
        for expert in range(count):
            slots.block(Slot(0, expert % 2)).copy_(store.blocks[expert], non_blocking=True)

    return drive, memcpy


def rate(bench: Bench) -> list[Check]:
    """Compare the links, driven through their queues, with plain copies of the same bytes."""
    gigabytes = bench.expert_bytes * bench.cfg.sizes.copies / GB
    ways = [copies(bench, device) for device in bench.testbed.devices]
    link, memcpy = map(bench.timed, ways[0])

    def at_once() -> None:
        with ThreadPoolExecutor(len(ways)) as pool:
            list(pool.map(lambda way: way[0](), ways))

    together = bench.timed(at_once)
    return [
        measured("link rate / plain copy rate", memcpy / link, at_least=0.95),
        measured("link rate", gigabytes / link, "GB/s"),
        measured("plain copy rate", gigabytes / memcpy, "GB/s"),
        measured("rate of all links at once", gigabytes * len(ways) / together, "GB/s"),
    ]


def overlap(bench: Bench) -> list[Check]:
    """Run compute alone, copies alone and both at once; 1 is perfect overlap, 0 is none."""
    drive, _ = copies(bench, bench.device)
    matrix, times = bench.matrix(bench.device), 10

    def compute() -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    def both() -> None:
        with ThreadPoolExecutor(1) as pool:
            driven = pool.submit(drive)
            compute()
            driven.result()

    copying = bench.timed(drive)
    # As long as the copies take.
    times = max(1, round(times * copying / bench.timed(compute)))
    alone, together = bench.timed(compute), bench.timed(both)
    return [
        measured("overlap", (alone + copying - together) / min(alone, copying), at_least=0.8),
        measured("compute alone", alone * 1e3, "ms"),
        measured("copy alone", copying * 1e3, "ms"),
        measured("both at once", together * 1e3, "ms"),
    ]


def overheads(bench: Bench) -> list[Check]:
    """Compare engine and `generate` on the device, everything resident."""
    sizes = bench.cfg.sizes
    return engine.resident_overheads(SCALE_MODEL, bench.device, sizes.tokens, sizes.rounds)


def calibrate(bench: Bench) -> list[Check]:
    """Measure what the roofline is made of, and write the testbed that this machine is."""
    device, matrix = bench.device, bench.matrix(bench.device)
    # Four matrices together do not fit a cache.
    rows, row, tall = len(matrix), matrix[:1], matrix.repeat(4, 1)
    scalar = torch.zeros((), device=device)
    rates = {check["name"]: check["value"] for check in rate(bench)}
    kernel_s = bench.timed(lambda: [scalar.add_(1) for _ in range(100)]) / 100
    sync_s = max(0.0, bench.timed(lambda: scalar.add_(1).item()) - kernel_s)
    # A row times a matrix takes as long as reading it.
    read_s = bench.timed(lambda: linear(row, tall))
    product_s = bench.timed(lambda: torch.mm(matrix, matrix))
    small = torch.zeros(1, pin_memory=True)
    latency_s = bench.timed(lambda: scalar.copy_(small[0], non_blocking=True))
    layer_s, hop_s = _layer_seconds(bench, kernel_s, sync_s), 0.0
    if len(bench.testbed.devices) > 1:
        # A row to the next device and back.
        there, hopping = bench.testbed.devices[1], row.new_zeros(1, 4096)
        hop_s = bench.timed(lambda: hopping.to(there).to(device))
    beside = {
        "host_memory_gb_s": rates["rate of all links at once"],
        "hop_us": hop_s * 1e6,
        "layer_us": layer_s * 1e6,
    }
    accelerator = {
        "memory_gb_s": tall.nbytes / read_s / 1e9,
        "matrix_tflops": 2 * rows**3 / product_s / 1e12,
        "memory_gb": torch.cuda.mem_get_info(device)[1] / 1e9,
        "kernel_us": kernel_s * 1e6,
        "sync_us": sync_s * 1e6,
    }
    link = {"gb_s": rates["link rate"], "latency_us": latency_s * 1e6}
    parts = {"accelerator": accelerator, "link": link, "host": _host(bench)}
    _write_testbed(bench, {**beside, **parts})
    told = [(f"{part}.{name}", value) for part, one in parts.items() for name, value in one.items()]
    return [measured(name, value) for name, value in (*beside.items(), *told)]


def _host(bench: Bench) -> dict[str, float]:
    """Measure the host's roofline, as systems that compute experts there use it."""
    matrix, scalar = bench.matrix(torch.device("cpu")), torch.zeros(())
    few, tall = matrix[:HOST_ROWS], matrix.repeat(16, 1)
    read_s = bench.timed(lambda: linear(few[:1], tall))
    product_s = bench.timed(lambda: linear(few, tall))
    kernel_s = bench.timed(lambda: [scalar.add_(1) for _ in range(100)]) / 100
    return {
        "memory_gb_s": tall.nbytes / read_s / 1e9,
        "matrix_tflops": 2 * len(few) * tall.numel() / product_s / 1e12,
        "kernel_us": kernel_s * 1e6,
    }


def _layer_seconds(bench: Bench, kernel_s: float, sync_s: float) -> float:
    """Return what the host adds to a layer, as far as launches and reads do not explain it."""
    model = OffloadedModel.from_model(engine.scale_model(SCALE_MODEL), bench.device)
    with resident_runtime(model, OnDemandPolicy(model.shape), grouped=False) as runtime:
        requests = [random_request(n, model, bench.cfg.sizes.tokens) for n in range(2)]
        (_, served) = serve(runtime, requests)
    launches = DENSE_KERNELS + EXPERT_KERNELS * model.shape.top_k
    explained = launches * kernel_s + sync_s
    return max(0.0, (served.tpot or 0.0) / model.shape.layers - explained)


def _write_testbed(bench: Bench, numbers: dict[str, Any]) -> None:
    all_of_it = {"memory_efficiency": 1.0, "matrix_efficiency": 1.0}
    testbed = OmegaConf.merge(
        OmegaConf.load(CONF / "simulated.yaml"),
        {"accelerator": all_of_it, "host": all_of_it},
        {"link": {"efficiency": 1.0}, "chunk_mb": bench.testbed.chunk_bytes / MB},
        {"name": f"{bench.testbed.name} (measured)", "devices": len(bench.testbed.devices)},
        numbers,
    )
    write_testbed(bench.folder / TESTBED, testbed, "experiments.bench.gpu")


def full_size(bench: Bench) -> list[Check]:
    """Serve full-size models under every budget with every system; simulate each run beside it."""
    checks, cfg = [], bench.cfg
    room = sum(torch.cuda.mem_get_info(device)[1] for device in bench.testbed.devices) / GB
    # The rest of a model, its caches and CUDA need some as well.
    budgets = [budget for budget in cfg.budgets if budget < MOST_OF_MEMORY * room]
    if left := [budget for budget in cfg.budgets if budget not in budgets]:
        print(f"left out, as the devices have {room:.0f} GB: budgets of {left} GB")
    for case in itertools.product(cfg.models, cfg.routings, budgets, cfg.systems):
        model, routing, budget, system = case
        name = f"{model}, {routing} routing, {budget} GB, {system}"
        if routing == "scale":
            facts = cfg.models[model]
            shape = ModelShape(facts.layers, facts.experts, facts.top_k, facts.hidden_size)
            policy = build(run_config(cfg, system, model=facts).system, shape=shape)
            # What asks later gates about hidden states follows no trace.
            if policy.placement.hidden_states:
                continue
        try:
            checks += _run_and_simulate(bench, name, *case)
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            checks.append(measured(f"{name}: {type(error).__name__}: {first}", 0.0, at_least=1))
        release()
    return checks


def _run_and_simulate(
    bench: Bench, name: str, model: str, routing: str, budget: float, system: str
) -> list[Check]:
    """Say what a run measures; return how far its replay in the calibrated testbed is from that."""
    cfg, runs = bench.cfg, bench.folder / "runs"
    choices = {"model": cfg.models[model], "memory_budget": budget}
    own = runs / f"{model}-recorded"
    trace = own / "trace.parquet"
    if routing == "scale":
        trace = kept_trace(run_config(cfg, system, **choices, weights="scale"), Console(quiet=True))
    elif not trace.exists():
        # Once for all: what is served is lossless, whatever the system.
        ensure_record(run_config(cfg, "on_demand", **choices, record=True, output=str(own)))
    folder = runs / f"{model}-{routing}-{budget}-{system}"
    follows = str(trace) if routing == "scale" else None
    live = ensure_record(run_config(cfg, system, **choices, routing=follows, output=str(folder)))
    choices |= {"testbed": OmegaConf.load(bench.folder / TESTBED), "routing": str(trace)}
    simulated = ensure_record(run_config(cfg, system, **choices, output=f"{folder}-simulated"))
    peak = live["summary"]["peak_slot_bytes"] / (budget * GB)
    checks, told = [measured(f"{name}: peak slot bytes / budget", peak, at_most=1)], []
    for of in ("TTFT", "TPOT"):
        real, sim = (one["summary"][f"{of.lower()}_s"]["mean"] for one in (live, simulated))
        told.append(f"{of} {real * 1e3:,.0f} ms (simulated {sim * 1e3:,.0f})")
        deviation, what = abs(sim / real - 1), f"{name}: {of}, simulated is off by"
        checks.append(measured(what, deviation, at_most=MOST_DEVIATION))
    print(f"{name}:", ", ".join(told))
    return checks


Parts = Mapping[str, Callable[[Bench], list[Check]]]
PARTS: Parts = {
    "Machine": machine,
    "Lossless": lossless,
    "Link rate": rate,
    "Overlap": overlap,
    "Overheads": overheads,
    "Calibration": calibrate,
    "Full size": full_size,
}


def run_parts(bench: Bench, console: RichConsole, parts: Parts = PARTS) -> dict[str, Facts]:
    """Run every part, whatever becomes of the others, and print and return what each measured."""
    results = {}
    for name, part in parts.items():
        checks, cause = list[Check](), None
        try:
            checks = part(bench)
            # Runs are told one by one.
            shown = [one for one in checks if part is not full_size or one["met"] is False]
            engine.print_checks(name, shown, console)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            console.print(f"{name} failed: {cause}", style="red", markup=False)
        passed = cause is None and all(one["met"] is not False for one in checks)
        results[name] = {"passed": passed, "error": cause, "checks": checks}
        release()
    return results


def release() -> None:
    """Give freed memory back, so that what follows starts as the first did."""
    gc.collect()
    torch.cuda.empty_cache()


def summary(parts: Mapping[str, Facts]) -> list[str]:
    """Return a line a part, pass or fail, and which of its lines fell short."""
    lines = []
    for name, part in parts.items():
        short = [one["name"] for one in part["checks"] if one["met"] is False]
        why = part["error"] or "; ".join(short)
        lines.append(f"{'pass' if part['passed'] else 'FAIL'}  {name}{why and f': {why}'}")
    return lines


def check(cfg: DictConfig) -> bool:
    """Run all parts, write what they measured; return whether all passed. Raises UserError."""
    testbed = build(cfg.testbed)
    if not isinstance(testbed, Testbed) or testbed.mode != "measured":
        raise UserError("testbed: only CUDA devices are checked; use testbed=local")
    hardware = re.sub(r"[^a-z0-9]+", "-", testbed.name.lower()).strip("-")
    bench = Bench(cfg, testbed, Path(cfg.output) / hardware)
    parts = run_parts(bench, RichConsole())
    passed = all(part["passed"] for part in parts.values())
    driver, query = None, ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with suppress(OSError, subprocess.CalledProcessError):
        driver = subprocess.check_output([*query, "--id=0"], text=True).strip()
    facts: Facts = {"hardware": testbed.name, "driver": driver, "cuda": torch.version.cuda}
    facts |= {"passed": passed, "parts": parts, **provenance()}
    write_json(bench.folder / "summary.json", facts)
    pack_runs(bench.folder)
    print(*summary(parts), f"written to {bench.folder}", sep="\n")
    return passed


@hydra.main(config_path="../../conf", config_name="gpu", version_base="1.3")
@command("interrupted; complete runs are kept: start again to go on")
def main(cfg: DictConfig) -> None:
    """Check this machine; exit 1 if a line falls short, 2 without a CUDA device."""
    transformers.logging.disable_progress_bar()
    sys.exit(0 if check(cfg) else 1)


if __name__ == "__main__":
    main()
