"""Runs of DeepSpeed ZeRO on the unmodified model: no expert cache, so no accesses and no budget."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from baselines.deepspeed_zero import ZeroOptions, choose_accelerator, under_zero, watching
from experiments.errors import UserError, refusing
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.live import LiveBackend, LogitsLog, PlainRuntime
from experiments.run.models import cast_of, free_bytes, full_expert_bytes, load_plain
from experiments.run.protocol import KINDS, Measurement, Reference, Setup
from experiments.run.schedule import Server
from finemoe.offload.model import find_moe_layers, shape_of
from finemoe.offload.timeline import Timeline
from finemoe.testbed import Testbed

LINKS = {
    "cpu": "none: parameters are gathered in host memory at memory speed",
    "cuda": "DeepSpeed's own copies from page-locked memory",
}
NOT_APPLICABLE = (  # of a summary: what only an expert cache has
    *(*KINDS, "bytes_prefetched", "bytes_on_demand", "bytes_wasted", "bytes_not_copied"),
    *("peak_slot_bytes", "phase_seconds"),
)


@dataclass
class ZeroSetup(Setup):
    """A whole model, which DeepSpeed takes over when serving begins."""

    testbed: Testbed
    model: Any
    options: ZeroOptions
    stack: ExitStack
    backend: LiveBackend | None = None  # once serving has begun
    peak: int = 0  # bytes, the most that a CUDA device had while requests were measured

    def __post_init__(self) -> None:
        modules = find_moe_layers(self.model)[1]
        fused = [list(module.parameters(recurse=False)) for module in modules]
        self.experts: tuple[nn.Parameter, ...] = tuple(chain.from_iterable(fused))
        # DeepSpeed empties the parameters.
        self.expert_bytes, whole = _bytes(self.experts), _bytes(self.model.parameters())
        self.dense_bytes = whole - self.expert_bytes
        cfg, self.device = self.cfg, self.testbed.devices[0]
        self.cast = cast_of(cfg.model, str(cfg.weights), self.model.dtype, whole)
        self.stored = sum(parameter[0].nbytes for parameter in fused[0])
        self.full = full_expert_bytes(cfg.model, str(cfg.weights), self.stored)

    def description(self) -> tuple[str, ...]:
        cfg, links = self.cfg, LINKS[self.device.type]
        return (
            f"{cfg.model.name} ({cfg.weights} weights) on {self.device}",
            *([f"weights: {self.cast}"] if self.cast else []),
            f"system {cfg.system.label}: memory_budget is not applicable; links: {links}",
        )

    def reference(self, console: Console) -> Reference | None:
        """Serve with the model before DeepSpeed has it, with the same kernels."""
        self.model.eval()
        self.model.set_experts_implementation(self.options.experts)
        device, measured = self.device, self.workload.measured
        room = device.type == "cpu" or _bytes(self.model.parameters()) < 0.9 * free_bytes(device)
        if not self.cfg.verify or not room:
            return None
        log = self.log = LogitsLog()
        backend = LiveBackend(PlainRuntime(self.model.to(device)))
        server = Server(backend, listeners=[lambda step: log.keep(step, backend.logits)])
        with console.progress("reference", len(measured)) as advance:
            for _ in server.serve(self.settings.schedule(measured)):
                advance(1)
        self.model.to("cpu")
        free_bytes(device)
        return None

    @contextmanager
    def serving(self, policy: Any, timeline: Timeline | None) -> Iterator[LiveBackend]:
        """Yield the one backend there can be: DeepSpeed takes the model over for good."""
        if self.backend is None:
            model, cfg = self.model, self.cfg
            hidden = cfg.model.hidden_size / model.config.get_text_config().hidden_size
            scaled = hidden if cfg.weights == "scale" else 1.0
            sizes = self.options, self.full / self.stored, scaled
            zero = under_zero(model, self.device, *sizes)
            kinds = (torch.AcceleratorError, torch.OutOfMemoryError)
            remedy = "lift the limit of page-locked memory (ulimit -l), or take a smaller model"
            with refusing("DeepSpeed cannot take the model over", *kinds, remedy=remedy):
                self.backend = LiveBackend(PlainRuntime(self.stack.enter_context(zero)))
        yield self.backend

    @contextmanager
    def measuring(self, backend: LiveBackend, measurement: Measurement) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))

    def facts(self, measurement: Measurement) -> dict[str, Any]:
        """Serve once more, watching what is gathered, which takes time: so after measuring."""
        backend, larger, size = self.backend, self.full / self.stored, self.cfg.workload.batch_size
        assert backend is not None
        with watching(self.model, self.experts) as gathered:
            list(Server(backend).serve(self.settings.schedule(self.workload.measured[:size])))
        return {
            "routing": "the model's own gates",
            "time_scale": None,
            "links": LINKS[self.device.type],
            "expert_bytes": self.full,
            "stored_expert_bytes": self.stored,
            "positions": None,
            "cast": self.cast,
            "summary": {
                **dict.fromkeys(NOT_APPLICABLE),
                "dense_bytes": self.dense_bytes,
                "phases": {},
                "peak_gathered_expert_bytes": round(gathered["experts"] * larger),
                "peak_gathered_stored_bytes": gathered["total"],
                "peak_device_bytes": self.peak or None,
                "host_expert_bytes": round(self.expert_bytes * larger),
            },
        }


@contextmanager
def prepare(cfg: DictConfig, testbed: Testbed, console: Console) -> Iterator[ZeroSetup]:
    """Load the model and draw the workload; raise UserError for what cannot be."""
    label = cfg.system.label
    if cfg.store.load or cfg.store.save:
        raise UserError(f"system={label} keeps no store to load or save")
    if cfg.routing:
        raise UserError(f"system={label} follows no trace; leave routing= out")
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    settings, options = build(cfg.workload), build(cfg.system)
    model, tokenizer = load_plain(cfg.model, str(cfg.weights))
    with refusing(f"system={label}", ValueError):
        choose_accelerator(testbed.devices[0])
    load = settings.draw(build(cfg.dataset), tokenizer, cfg.seed)
    run = (cfg, testbed, settings, load, None, shape_of(model), None, (), tokenizer)
    with ExitStack() as stack:
        yield ZeroSetup(*run, model, options, stack)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
