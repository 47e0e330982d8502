"""One run of DeepSpeed ZeRO: the plain model, the same requests, the same times and record.

It has no experts cache, so accesses are absent, and no memory budget: what it takes is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import nn

from baselines.deepspeed_zero import Gathered, Shrinkage, ZeroModel, ZeroOptions, choose_accelerator
from experiments.errors import UserError
from experiments.run.config import build, workload_settings
from experiments.run.console import Advance, Console
from experiments.run.datasets import PromptSet
from experiments.run.metrics import Accesses, request_table
from experiments.run.models import full_expert_bytes, load_plain
from experiments.run.records import write_record
from experiments.run.run_record import Measurement, RunFacts, run_record
from experiments.run.serving import PlainRuntime, Server, in_batches
from experiments.run.setup import draw_workload, free_bytes
from experiments.run.workloads import OfflineSettings, OfflineWorkload
from finemoe.offload.model import find_moe_layers
from finemoe.testbed import SimulatedTestbed, Testbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNPACED = "none: parameters are gathered in host memory at memory speed"
COPIES = "DeepSpeed's own copies from page-locked memory"
ACCESSES = ("hits", "late", "misses")
NOT_APPLICABLE = (
    *ACCESSES,
    "bytes_prefetched",
    "bytes_on_demand",
    "bytes_wasted",
    "peak_slot_bytes",
    "slot_budget_bytes",
    "phase_seconds",
)
"""What a summary says of systems that have an experts cache."""


@dataclass(frozen=True)
class ZeroSetup:
    """What one run consists of."""

    cfg: DictConfig
    testbed: Testbed
    model: PreTrainedModel
    tokenizer: Any
    prompts: PromptSet
    settings: OfflineSettings
    workload: OfflineWorkload
    options: ZeroOptions

    @property
    def device(self) -> torch.device:
        """The device of the one process; further ones stay idle."""
        return self.testbed.devices[0]


@dataclass(frozen=True)
class ExpertWeights:
    """A model's experts, their bytes, and those of one as stored and at full size."""

    parameters: tuple[nn.Parameter, ...]
    nbytes: int
    stored: int
    full: int


@dataclass(frozen=True)
class Memory:
    """What serving took, in bytes as stored: parameters on the device at once, all that CUDA had.

    `device` is None on the CPU, whose gathered parameters lie beside everything else.
    """

    gathered: Gathered
    device: int | None


def run_zero(cfg: DictConfig, testbed: Testbed | SimulatedTestbed, console: Console) -> Any:
    """Carry out one run and write its record; return the record. Raises UserError."""
    setup = _prepare(cfg, testbed)
    console.announce_plain(cfg, setup.device, _links(setup), setup.prompts)
    experts = _experts(setup)
    dense_bytes = _bytes(setup.model) - experts.nbytes
    reference = _reference(setup, console)
    measurement = Measurement(same_as_reference=None if reference is None else True)
    hidden = cfg.model.hidden_size / setup.model.config.get_text_config().hidden_size
    shrinkage = Shrinkage(experts.full / experts.stored, hidden if cfg.weights == "scale" else 1.0)
    load = setup.workload
    total = (len(load.warmup) + len(load.measured)) * setup.settings.repeats
    with (
        ZeroModel(setup.model, setup.device, setup.options, shrinkage) as zero,
        console.progress("serving", total) as advance,
    ):
        server = Server(PlainRuntime(zero))
        memory = _measure(setup, server, reference, measurement, advance)
        with zero.watching(experts.parameters) as gathered:
            server.serve(next(in_batches(load.measured, setup.settings.batch_size)))
    record = _record(setup, experts, dense_bytes, measurement, Memory(gathered, memory))
    requests = request_table(measurement.served, measurement.accesses)
    requests[[*ACCESSES]] = None
    path = write_record(Path(cfg.output), record, requests)
    first = measurement.served[0]
    decode = setup.tokenizer.decode
    sample = decode(list(first.request.prompt)), decode(list(first.tokens))
    console.results(record, path, sample)
    return record


def _prepare(cfg: DictConfig, testbed: Testbed | SimulatedTestbed) -> ZeroSetup:
    if isinstance(testbed, SimulatedTestbed):
        raise UserError("system=deepspeed_zero serves with a real model; use testbed=auto")
    if cfg.store.load or cfg.store.save:
        raise UserError(f"system={cfg.system.label} keeps no store to load or save")
    settings = workload_settings(cfg.workload)
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    options: ZeroOptions = build(cfg.system)
    model, tokenizer = load_plain(cfg.model, str(cfg.weights))
    try:
        choose_accelerator(testbed.devices[0])
    except ValueError as error:
        raise UserError(f"system={cfg.system.label}: {error}") from error
    prompts, workload = draw_workload(cfg, settings, tokenizer)
    return ZeroSetup(cfg, testbed, model, tokenizer, prompts, settings, workload, options)


def _experts(setup: ZeroSetup) -> ExpertWeights:
    modules = find_moe_layers(setup.model)[1]
    parameters = tuple(p for module in modules for p in module.parameters(recurse=False))
    stored = sum(p[0].nbytes for p in modules[0].parameters(recurse=False))
    full = full_expert_bytes(setup.cfg.model, str(setup.cfg.weights), stored)
    return ExpertWeights(parameters, sum(p.nbytes for p in parameters), stored, full)


def _reference(setup: ZeroSetup, console: Console) -> list[list[torch.Tensor]] | None:
    """Return the measured logits of the model before DeepSpeed has it, with the same kernels."""
    model: Any = setup.model
    model.eval()
    model.set_experts_implementation(setup.options.experts)
    device = setup.device
    room = device.type == "cpu" or _bytes(model) < 0.9 * free_bytes(device)
    if not setup.cfg.verify or not room:
        return None
    measured = setup.workload.measured
    server = Server(PlainRuntime(model.to(device)))
    reference = []
    with console.progress("reference", len(measured)) as advance:
        for batch in in_batches(measured, setup.settings.batch_size):
            server.serve(batch)
            reference.append([logits.cpu() for logits in server.logits])
            advance(len(batch))
    model.to("cpu")
    free_bytes(device)
    return reference


def _measure(
    setup: ZeroSetup,
    server: Server,
    reference: list[list[torch.Tensor]] | None,
    measurement: Measurement,
    advance: Advance,
) -> int | None:
    """Serve as often as the config repeats; return the peak bytes of a CUDA device."""
    size, cuda = setup.settings.batch_size, setup.device.type == "cuda"
    peak = 0
    for _ in range(setup.settings.repeats):
        for batch in in_batches(setup.workload.warmup, size):
            server.serve(batch)
            advance(len(batch))
        if cuda:
            torch.cuda.reset_peak_memory_stats(setup.device)
        for number, batch in enumerate(in_batches(setup.workload.measured, size)):
            began = time.perf_counter()
            measurement.served += server.serve(batch)
            measurement.busy_seconds += time.perf_counter() - began
            if reference is not None and measurement.same_as_reference:
                pairs = zip(server.logits, reference[number], strict=True)
                measurement.same_as_reference = all(torch.equal(a.cpu(), b) for a, b in pairs)
            advance(len(batch))
        if cuda:
            peak = max(peak, torch.cuda.max_memory_allocated(setup.device))
    for served in measurement.served:
        measurement.accesses.iterations.update(dict.fromkeys(served.iterations, Accesses()))
    return peak if cuda else None


def _record(
    setup: ZeroSetup,
    experts: ExpertWeights,
    dense_bytes: int,
    measurement: Measurement,
    memory: Memory,
) -> dict[str, Any]:
    facts = RunFacts(
        mode=setup.testbed.mode,
        testbed=setup.testbed.name,
        routing="the model's own gates",
        dataset=setup.prompts.dataset,
        dataset_source=setup.prompts.source,
        dataset_sha256=setup.prompts.sha256,
        budget_bytes=0,
        slots=(),
        expert_bytes=experts.full,
        stored_expert_bytes=experts.stored,
        dense_bytes=dense_bytes,
        time_scale=setup.testbed.time_scale,
        history="none",
        history_bytes={},
        bound=None,
    )
    record = run_record(setup.cfg, facts, measurement)
    gathered, larger = memory.gathered, experts.full / experts.stored
    record["summary"] |= {
        **dict.fromkeys(NOT_APPLICABLE),
        "phases": {},
        "peak_gathered_expert_bytes": round(gathered.experts * larger),
        "peak_gathered_stored_bytes": gathered.total,
        "peak_device_bytes": memory.device,
        "host_expert_bytes": round(experts.nbytes * larger),
    }
    return {**record, "memory_budget_gb": None, "time_scale": None, "links": _links(setup)}


def _links(setup: ZeroSetup) -> str:
    return UNPACED if setup.device.type == "cpu" else COPIES


def _bytes(model: PreTrainedModel) -> int:
    return sum(p.nbytes for p in model.parameters())
