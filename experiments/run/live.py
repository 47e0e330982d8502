"""Live runs: a real model serves requests greedily through the engine, in real time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import pad

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run.config import budget_slots, build, load_store
from experiments.run.console import Console, slots_line
from experiments.run.models import LoadedModel, load_model
from experiments.run.protocol import Measurement, Reference, Setup
from experiments.run.room import Extent, extent, needed_beside, shortage
from experiments.run.schedule import FixedBatches, Request, Served, Server, Step
from experiments.run.testbeds import kinds
from experiments.run.traced import Script, script, traced_workload
from experiments.run.workloads import Workload, WorkloadSettings
from finemoe.assemble import measured_machine, offloading_runtime, resident_runtime
from finemoe.offload.budget import spread
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import Iteration, LayerOutcome, Machine, Policy
from finemoe.offload.timeline import Timeline
from finemoe.recorder import gate_weights
from finemoe.testbed import Testbed
from finemoe.traced_gates import TracedGates

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig


@dataclass(frozen=True)
class Context:
    """Keys and values of one request: the last `tokens` of one row of a cache."""

    cache: DynamicCache
    row: int
    rows: int  # how many rows the cache has
    tokens: int


@dataclass
class LiveBackend:
    """Runs steps through a runtime.

    Routers never see padding: prompts of one prefill are equally long, and a decode has one row per
    request, whose contexts are padded on the left, in the cache only, and masked. (A rotary
    embedding that changes with the longest position of a batch, like Phi-3.5-MoE's beyond 4,096
    tokens, therefore takes a short context beside a long one as if it were long.)
    """

    runtime: Any  # a LiveRuntime, or what has its model, `forward`, `end_request` and `drain`
    choose: Callable[[Step, Tensor], list[int]] = lambda step, logits: logits.argmax(-1).tolist()
    before: Callable[[Step], None] = lambda step: None  # called before every forward pass
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """The last step's, shape (B, vocabulary), on the model's device."""
    _contexts: dict[int, Context] = field(default_factory=dict)
    _tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def now(self) -> float:
        return self.clock()

    def wait(self, until: float) -> None:
        self.sleep(max(0.0, until - self.clock()))

    @torch.inference_mode()
    def forward(self, step: Step) -> None:
        self.before(step)
        self.logits = self._prefill(step) if step.phase == "prefill" else self._decode(step)
        for request, token in zip(step.requests, self.choose(step, self.logits), strict=True):
            self._tokens.setdefault(request.number, []).append(token)

    def end_request(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        self.runtime.end_request(request.number)
        del self._contexts[request.number]
        return request.prompt, tuple(self._tokens.pop(request.number))

    def drain(self) -> None:
        self.runtime.drain()

    def measuring(self, measurement: Measurement) -> AbstractContextManager[None]:
        return measurement.of(self.runtime)

    def _run(self, step: Step, **inputs: Any) -> Any:
        return self.runtime.forward(step.iteration, use_cache=True, logits_to_keep=1, **inputs)

    def _prefill(self, step: Step) -> Tensor:
        prompts = [request.prompt for request in step.requests]
        tokens = _sent(prompts, self.runtime.model.device)
        output = self._run(step, input_ids=tokens)
        for row, request in enumerate(step.requests):
            self._contexts[request.number] = Context(output.cache, row, *tokens.shape)
        return output.logits[:, -1]

    def _decode(self, step: Step) -> Tensor:
        device, numbers = self.runtime.model.device, [one.number for one in step.requests]
        contexts = self._together([self._contexts[number] for number in numbers])
        lengths = _sent([[context.tokens] for context in contexts], device)
        longest = max(context.tokens for context in contexts)
        mask = None
        if any(context.tokens < longest for context in contexts):
            mask = (torch.arange(longest + 1, device=device) >= longest - lengths).long()
        tokens = _sent([[self._tokens[n][-1]] for n in numbers], device)
        inputs = {"input_ids": tokens, "position_ids": lengths, "attention_mask": mask}
        output = self._run(step, cache=contexts[0].cache, **inputs)
        for number, context in zip(numbers, contexts, strict=True):
            self._contexts[number] = replace(context, tokens=context.tokens + 1)
        return output.logits[:, -1]

    def _together(self, contexts: list[Context]) -> list[Context]:
        """Return the contexts as the rows of one cache, which is built only if they are not yet."""
        cache = contexts[0].cache
        rows = [context.row for context in contexts if context.cache is cache]
        if len(rows) == len(contexts) and rows == list(range(contexts[0].rows)):
            return contexts
        cache, count = merged(contexts, self.runtime.model.model.config), len(contexts)
        return [Context(cache, row, count, one.tokens) for row, one in enumerate(contexts)]


def _sent(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return whole numbers on a device, on their way there: the host does not wait."""
    tensor = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class PlainRuntime:
    """Runs a model as it is: no policy, no budget."""

    model: Any

    def forward(self, iteration: Iteration, **inputs: Any) -> Any:
        """Run one forward pass."""
        return self.model(**inputs)

    def end_request(self, request: int) -> None:
        """Nothing was kept for a request."""

    def drain(self) -> None:
        """Nothing is under way."""


def serve(runtime: Any, requests: Sequence[Request], size: int = 1) -> list[Served]:
    """Serve requests through a runtime, in batches of `size`."""
    return list(Server(LiveBackend(runtime)).serve(FixedBatches(requests, size)))


def merged(contexts: Sequence[Context], config: PreTrainedConfig) -> DynamicCache:
    """Return one cache with a row for each context, padded with zeros on the left."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    longest = max(context.tokens for context in contexts)
    for index, layer in enumerate(cache.layers):
        rows = [_own(context, index) for context in contexts]
        width = max(keys.shape[-2] for keys, _ in rows)
        keys, values = (
            torch.cat([pad(row[part], (0, 0, width - row[part].shape[-2], 0)) for row in rows])
            for part in (0, 1)
        )
        assert isinstance(layer, DynamicLayer)
        layer.update(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            # A window keeps fewer tokens than it has seen, and its mask counts those seen.
            layer.cumulative_length = longest
    return cache


def _own(context: Context, index: int) -> tuple[Tensor, Tensor]:
    """Return a context's keys and values in one layer, each (1, heads, tokens kept, width)."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layer: Any = context.cache.layers[index]
    # A kind of its own keeps more than keys and values, such as an index or a state.
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
        cause = f"requests cannot share a {type(layer).__name__} of this model's cache"
        raise UserError(f"{cause}; use workload=offline")
    row = slice(context.row, context.row + 1)
    kept = min(context.tokens, layer.keys.shape[-2])
    return layer.keys[row, :, -kept:], layer.values[row, :, -kept:]


@dataclass
class LogitsLog:
    """The logits of one pass, step by step, with which another pass is compared bit for bit."""

    kept: list[Tensor] = field(default_factory=list)
    same: bool = True
    same_tokens: bool = True  # whether the largest logits are those of the same tokens
    _compared: int = 0
    _pending: list[Tensor] = field(default_factory=list)

    def keep(self, step: Step, logits: Tensor) -> None:
        """Take a step's logits (B, vocabulary)."""
        self.kept += self._settled(step, logits)

    def compare(self, step: Step, logits: Tensor) -> None:
        """Compare a step's logits with those kept of the same step; the first follows the last."""
        for found in self._settled(step, logits):
            kept = self.kept[self._compared % len(self.kept)]
            self.same &= torch.equal(found, kept)
            self.same_tokens &= torch.equal(found.argmax(-1), kept.argmax(-1))
            self._compared += 1

    def _settled(self, step: Step, logits: Tensor) -> list[Tensor]:
        """Return logits on the host once a request leaves: until then no step waits for a copy."""
        self._pending.append(logits)
        if not step.leaving:
            return []
        settled, self._pending = self._pending, []
        return [one.cpu() for one in settled]


OTHER_SUMS = (
    "this model's own experts add up otherwise: lossless means the same logits under any budget, "
    "not those of generate"
)


@dataclass
class LiveSetup(Setup):
    """A model, its experts in host memory, and what serves with it."""

    testbed: Testbed
    policy: Policy
    model: LoadedModel
    budget_bytes: int
    resident: bool  # whether all experts fit the devices; on the CPU they are used where they lie
    machine: Machine | None = None  # what a policy is told that may have the host compute
    script: Script | None = None  # what overrules gates and tokens, if a trace does
    steps: list[Step] = field(default_factory=list)  # measured, if the schedule is not fixed

    def description(self) -> tuple[str, ...]:
        testbed, prompts = self.testbed, self.workload.prompts
        line = f"testbed {testbed.name}, {len(testbed.devices)} device(s)"
        if testbed.mode == "emulated":
            load = testbed.load_seconds(self.model.full_expert_bytes)
            line += f", {load * 1e3:.2f} ms to load an expert"
        elif len(kinds(testbed.devices)) > 1:
            line += "; experts are spread evenly: the smallest limits them, the slowest the speed"
        return (
            f"{self.model.name} ({self.model.weights} weights, {testbed.mode})",
            *([f"weights: {self.model.cast}"] if self.model.cast else []),
            *([_times(self.machine)] if self.machine else []),
            *([] if self.model.offloaded.as_eager else [OTHER_SUMS]),
            line,
            slots_line(self.shape, self.slots),
            f"prompts from {prompts.dataset}: {prompts.source}",
        )

    def backend(self, runtime: LiveRuntime) -> LiveBackend:
        """Return what serves through a runtime."""
        if self.script is None:
            return LiveBackend(runtime)
        return LiveBackend(runtime, self.script.tokens, self.script.begin)

    @contextmanager
    def serving(self, policy: Policy | None, timeline: Timeline | None) -> Iterator[LiveBackend]:
        with self.under_budget(policy or self.policy, timeline) as runtime:
            yield self.backend(runtime)

    @contextmanager
    def learning(self, policy: Policy) -> Iterator[tuple[LiveBackend, str]]:
        where = "with everything resident" if self.resident else "under the budget"
        with self.unbounded(policy) as runtime:
            yield self.backend(runtime), f"served {where}"

    def under_budget(self, policy: Policy, timeline: Timeline | None = None) -> LiveRuntime:
        """Return a runtime that serves under the memory budget."""
        model, full = self.model.offloaded, self.model.full_expert_bytes
        protect = bool(self.cfg.protect)
        places = self.testbed, self.slots, full
        return offloading_runtime(model, policy, *places, timeline, protect, self.machine)

    def unbounded(self, policy: Policy | None = None) -> LiveRuntime:
        """Return a runtime with every expert resident if they fit, else one under the budget."""
        policy = policy or OnDemandPolicy(self.shape)
        if self.resident:
            # The kernel is the one under the budget: logits are compared.
            grouped = sum(self.slots) == self.shape.size
            return resident_runtime(self.model.offloaded, policy, self.testbed.devices, grouped)
        return self.under_budget(policy)

    def record_routing(self, path: Path, console: Console) -> None:
        from experiments.run.routing import record

        load, settings = self.workload, self.settings
        schedules = [settings.recording(load)]
        if settings.fixed:
            history = settings.schedule(load.history, history=True)
            schedules = [history, settings.schedule(load.measured)]
        with self.unbounded() as runtime:
            record(runtime, self.model, load, schedules, self.cfg.seed, path, console)

    def reference(self, console: Console) -> Reference | None:
        verify = bool(self.cfg.verify) and self.resident
        if not (verify or self.policy.set_future_routing):
            return None
        load, settings = self.workload, self.settings
        routing: list[list[tuple[int, ...]]] = []

        def listen(outcome: LayerOutcome) -> None:
            if outcome.layer == 0:
                routing.append([])
            routing[-1].append(outcome.activated)

        self.log = LogitsLog() if verify else None
        progress = console.progress("reference", len(load.measured))
        with self.unbounded() as runtime, progress as advance:
            runtime.listeners.append(listen)
            backend = self.backend(runtime)
            server = Server(backend)
            list(server.serve(settings.schedule(load.warmup)))
            measured_from, server.busy_seconds = server.iterations, 0.0
            if log := self.log:
                server.listeners.append(lambda step: log.keep(step, backend.logits))
            for _ in server.serve(settings.schedule(load.measured)):
                advance(1)
        return Reference(routing, measured_from, server.busy_seconds if self.resident else None)

    def link_seconds(self, loads: Sequence[int]) -> float | None:
        """A CUDA link's rate is not known beforehand: there the bound is left to the simulation."""
        if not self.testbed.link_gb_s:
            return None
        return max(loads) * self.testbed.load_seconds(self.model.full_expert_bytes)

    def watch(self, backend: Any) -> Callable[[Step], None] | None:
        if self.settings.fixed:
            return super().watch(backend)
        if not (self.cfg.verify and self.resident):
            return None
        kept = self.log = LogitsLog()

        def keep(step: Step) -> None:
            self.steps.append(step)
            kept.keep(step, backend.logits)

        return keep

    def lossless(self, console: Console) -> bool | None:
        """Iterations that were not known beforehand are repeated now, every expert resident."""
        if self.log and not self.settings.fixed:
            with self.unbounded() as runtime, console.progress("verifying", len(self.steps)) as bar:
                backend = self.backend(runtime)
                for step in self.steps:
                    backend.forward(step)
                    self.log.compare(step, backend.logits)
                    for request in step.leaving:
                        backend.end_request(request)
                    bar(1)
        return super().lossless(console)

    def facts(self, measurement: Measurement) -> dict[str, Any]:
        model = self.model
        return {
            "routing": self.script.routing if self.script else "the model's own gates",
            "memory_budget_gb": self.budget_bytes / 1e9,
            "expert_bytes": model.full_expert_bytes,
            "stored_expert_bytes": model.offloaded.store.layout.nbytes,
            "positions": model.positions,
            "cast": model.cast,
            "as_eager_experts": model.offloaded.as_eager,
            "summary": {
                "slot_budget_bytes": self.budget_bytes,
                "dense_bytes": model.offloaded.dense_bytes,
            },
        }

    def sample(self, served: Served) -> tuple[str, str] | None:
        return texts(self.model.tokenizer, served) if self.settings.fixed else None


def _times(machine: Machine) -> str:
    """Say by which times a policy decides who computes an expert."""
    times = machine.load, machine.host(1), machine.device(1)
    load, host, device = (f"{seconds * 1e3:.3g} ms" for seconds in times)
    computed = f"the model's own, for a token, takes the host {host}, a device {device}"
    return f"a full-size expert is loaded in {load}; {computed}"


def texts(tokenizer: Any, served: Served) -> tuple[str, str]:
    """Return prompt and continuation of a request."""
    return tokenizer.decode(list(served.request.prompt)), tokenizer.decode(list(served.tokens))


def load_setup(cfg: DictConfig, testbed: Testbed, load: Workload | None = None) -> LiveSetup:
    """Load the model, draw the workload, build the policy; raise UserError for what cannot be."""
    settings = build(cfg.workload)
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    model = load_model(cfg.model, str(cfg.weights), testbed.devices[0], cfg.seed)
    shape = model.offloaded.shape
    policy: Policy = build(cfg.system, shape=shape)
    if policy.set_gates:
        try:
            policy.set_gates(gate_weights(model.offloaded))
        except ValueError as error:
            cause = f"system={cfg.system.label} applies gates to hidden states, but {error}"
            raise UserError(f"{cause}; choose another system") from error
    full, devices = model.full_expert_bytes, testbed.devices
    budget, slots = budget_slots(cfg, policy, full, shape, len(devices))
    load = load or settings.draw(build(cfg.dataset), model.tokenizer, cfg.seed)
    extents = _extents(cfg, settings, load, bool(policy.learn))
    own, nbytes = model.offloaded.model, model.offloaded.store.layout.nbytes
    text = own.config.get_text_config()
    beside = needed_beside(text, shape.top_k, own.dtype.itemsize, extents)
    if cause := shortage(devices, slots, nbytes, beside):
        remedy = "lower memory_budget, or the workload's batch size or lengths"
        raise UserError(f"the memory budget puts {cause}; {remedy}")
    everything = spread(shape, len(devices))
    resident = devices[0].type != "cuda" or not shortage(devices, everything, nbytes, beside)
    load_store(cfg, policy)
    machine = None
    if policy.host_experts:
        machine = measured_machine(model.offloaded, testbed, slots, full)
    return LiveSetup(
        cfg, testbed, settings, load, policy, shape, slots, model, budget, resident, machine
    )


def _extents(
    cfg: DictConfig, settings: WorkloadSettings, load: Workload, learns: bool
) -> list[Extent]:
    """Return the extents of all that a run serves."""
    extents = [extent(settings.schedule(load.measured), bool(cfg.verify))]
    if learns or cfg.record:
        extents.append(extent(settings.schedule(load.history, history=True)))
    if cfg.record and not settings.fixed:
        extents.append(extent(settings.recording(load)))
    return extents


@contextmanager
def prepare(cfg: DictConfig, testbed: Testbed, console: Console) -> Iterator[LiveSetup]:
    """Yield the setup of a run. Raises UserError for what cannot be, or does not fit a device."""
    try:
        with _setup(cfg, testbed, console) as setup:
            yield setup
    except torch.OutOfMemoryError as error:
        cause = str(error).partition(". ")[0]
        raise UserError(
            f"{cause}; lower memory_budget, or the workload's batch or lengths"
        ) from error


@contextmanager
def _setup(cfg: DictConfig, testbed: Testbed, console: Console) -> Iterator[LiveSetup]:
    """Yield a setup whose gates a trace overrules where `routing` names one."""
    if not cfg.routing:
        yield load_setup(cfg, testbed)
        return
    load, traced, routing = traced_workload(cfg, build(cfg.workload), console)
    setup = load_setup(cfg, testbed, load)
    if setup.policy.placement.hidden_states:
        cause = f"system={cfg.system.label} applies gates to hidden states, which do not lead to a"
        raise UserError(f"{cause} trace's routing; replay it on a simulated testbed")
    with TracedGates(setup.model.offloaded) as gates:
        setup.script = script(cfg, traced, routing, gates, setup.model.offloaded)
        yield setup
