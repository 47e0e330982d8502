"""Live runs: a real model serves requests greedily through the engine, in real time."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import pad

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError, refusing
from experiments.run.config import build, build_policy
from experiments.run.console import Console, slots_line
from experiments.run.models import LoadedModel, attention_of, config_value, free_bytes, load_model
from experiments.run.protocol import Measurement, Reference, Setup
from experiments.run.routing import Script, record, traced_workload
from experiments.run.schedule import FixedBatches, Request, Schedule, Served, Server, Step
from experiments.run.testbeds import kinds
from experiments.run.workloads import Workload
from finemoe.assemble import measured_machine, offloading_runtime, resident_runtime
from finemoe.offload.budget import spread
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import Iteration, LayerOutcome, Machine, Policy
from finemoe.offload.timeline import Timeline
from finemoe.recorder import gate_weights
from finemoe.testbed import Testbed
from finemoe.traced_gates import TracedGates


@dataclass(frozen=True)
class Context:
    """Keys and values of one request: the last `tokens` of one row of a cache."""

    cache: Any  # a DynamicCache of transformers
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
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """The last step's, shape (B, vocabulary), on the model's device."""
    _contexts: dict[int, Context] = field(default_factory=dict)
    _tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def now(self) -> float:
        return time.perf_counter()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, until - self.now))

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

    def _run(self, step: Step, **inputs: Any) -> Any:
        return self.runtime.forward(step.iteration, use_cache=True, logits_to_keep=1, **inputs)

    def _prefill(self, step: Step) -> Tensor:
        tokens = _sent([one.prompt for one in step.requests], self.runtime.model.device)
        output = self._run(step, input_ids=tokens)
        for row, request in enumerate(step.requests):
            self._contexts[request.number] = Context(output.cache, row, *tokens.shape)
        return output.logits[:, -1]

    def _decode(self, step: Step) -> Tensor:
        device, numbers = self.runtime.model.device, [one.number for one in step.requests]
        contexts = self._together([self._contexts[number] for number in numbers])
        lengths = _sent([[context.tokens] for context in contexts], device)
        longest, mask = max(context.tokens for context in contexts), None
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


def merged(contexts: Sequence[Context], config: Any) -> Any:
    """Return one cache with a row for each context, padded with zeros on the left."""
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    cache: Any = DynamicCache(config=config)
    longest = max(context.tokens for context in contexts)
    for index, layer in enumerate(cache.layers):
        rows = [_own(context, index) for context in contexts]
        width = max(keys.shape[-2] for keys, _ in rows)
        padded = [[pad(one, (0, 0, width - one.shape[-2], 0)) for one in row] for row in rows]
        layer.update(*map(torch.cat, zip(*padded, strict=True)))
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


OWN_SUMS = (
    "this model's own experts add up otherwise: lossless means the same logits under any budget, "
    "not those of generate"
)


@dataclass
class LiveSetup(Setup):
    """A model, its experts in host memory, and what serves with it."""

    testbed: Testbed
    policy: Policy
    model: LoadedModel
    resident: bool  # whether all experts fit the devices; on the CPU they are used where they lie
    machine: Machine | None = None  # what the policy was told, if it asks
    script: Script | None = None  # what overrules gates and tokens, if a trace does
    steps: list[Step] = field(default_factory=list)  # measured, if the schedule is not fixed
    cpu: Counter[str] = field(default_factory=Counter)  # seconds of threads, see `cpu_seconds`

    def description(self) -> tuple[str, ...]:
        cfg, testbed, model = self.cfg, self.testbed, self.model
        line = f"testbed {testbed.name}, {len(testbed.devices)} device(s)"
        if testbed.mode == "emulated":
            milliseconds = testbed.load_seconds(model.full_expert_bytes) * 1e3
            line += f", {milliseconds:.2f} ms to load an expert"
        elif len(kinds(testbed.devices)) > 1:
            line += "; experts are spread evenly: the smallest limits them, the slowest the speed"
        notes = [f"weights: {model.cast}"] if model.cast else []
        if self.machine and self.policy.host_experts:
            times = self.machine.load, self.machine.host(1), self.machine.device(1)
            load, host, device = (f"{seconds * 1e3:.3g} ms" for seconds in times)
            computed = f"the model's own, for a token, takes the host {host}, a device {device}"
            notes.append(f"a full-size expert is loaded in {load}; {computed}")
        if not model.offloaded.as_eager:
            notes.append(OWN_SUMS)
        named = f"{cfg.model.name} ({cfg.weights} weights, {testbed.mode})"
        return (named, *notes, line, slots_line(self.shape, self.slots))

    def backend(self, runtime: LiveRuntime) -> LiveBackend:
        if self.script is None:
            return LiveBackend(runtime)
        return LiveBackend(runtime, self.script.tokens, self.script.begin)

    @contextmanager
    def serving(self, policy: Any, timeline: Timeline | None) -> Iterator[LiveBackend]:
        with self.under_budget(policy, timeline) as runtime:
            yield self.backend(runtime)

    @contextmanager
    def measuring(self, backend: LiveBackend, measurement: Measurement) -> Iterator[None]:
        before = backend.runtime.cpu_seconds()
        with super().measuring(backend, measurement):
            yield
        self.cpu.update(backend.runtime.cpu_seconds())
        self.cpu.subtract(before)

    @contextmanager
    def learning(self, policy: Policy) -> Iterator[tuple[LiveBackend, str]]:
        where = "with everything resident" if self.resident else "under the budget"
        with self.unbounded(policy) as runtime:
            yield self.backend(runtime), f"served {where}"

    def under_budget(self, policy: Policy, timeline: Timeline | None = None) -> LiveRuntime:
        """Return a runtime that serves under the memory budget."""
        places = self.testbed, self.slots, self.model.full_expert_bytes
        protect = bool(self.cfg.protect)
        return offloading_runtime(self.model.offloaded, policy, *places, timeline, protect)

    def unbounded(self, policy: Policy | None = None) -> LiveRuntime:
        """Return a runtime with every expert resident if they fit, else one under the budget."""
        policy = policy or OnDemandPolicy(self.shape)
        if self.resident:
            # The kernel is the one under the budget: logits are compared.
            grouped = sum(self.slots) == self.shape.size
            return resident_runtime(self.model.offloaded, policy, self.testbed.devices, grouped)
        return self.under_budget(policy)

    def record_routing(self, path: Path, console: Console) -> None:
        load, settings = self.workload, self.settings
        if settings.fixed:
            history = settings.schedule(load.history, history=True)
            schedules = [history, settings.schedule(load.measured)]
        else:
            schedules = [settings.recording(load)]
        with self.unbounded() as runtime:
            record(self.cfg, runtime, self.model, load, schedules, path, console)

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

        progress = console.progress("reference", len(load.measured))
        with self.unbounded() as runtime, progress as advance:
            runtime.listeners.append(listen)
            backend = self.backend(runtime)
            server = Server(backend)
            list(server.serve(settings.schedule(load.warmup)))
            measured_from, server.busy_seconds = server.iterations, 0.0
            if verify:
                log = self.log = LogitsLog()
                server.listeners.append(lambda step: log.keep(step, backend.logits))
            for _ in server.serve(settings.schedule(load.measured)):
                advance(1)
        return Reference(routing, measured_from, server.busy_seconds if self.resident else None)

    def load_seconds(self) -> tuple[float, float] | None:
        """A CUDA link's rate is not known beforehand: there the bound is left to the simulation."""
        if not self.testbed.link_gb_s:
            return None
        return self.testbed.load_seconds(self.model.full_expert_bytes), 0.0

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
            "expert_bytes": model.full_expert_bytes,
            "stored_expert_bytes": model.offloaded.store.layout.nbytes,
            "positions": model.positions,
            "cast": model.cast,
            "as_eager_experts": model.offloaded.as_eager,
            "summary": {"dense_bytes": model.offloaded.dense_bytes, "cpu_seconds": dict(self.cpu)},
        }


MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
CUDA_BYTES = 500_000_000  # assumed; see `needed_beside`
LESS = "lower memory_budget, or the workload's batch size or lengths"
Parts = Mapping[str, int]
Extent = tuple[int, int, int]  # the most tokens in caches, in a prefill, rows of logits


def needed_beside(config: Any, top_k: int, width: int, extents: Sequence[Extent]) -> Parts:
    """Return the bytes that serving takes beside weights, by part, of numbers `width` bytes wide.

    - KV cache: 2 x layers x keys and values for each token of the most that lie in caches at once,
      padding included: all twice, for a cache that grows or is joined is copied.
    - activations: (10 + K) h + 4 w for each token of the longest prefill: hidden states, attention
      (of h, or all its heads) and the outputs of K experts; and one expert, of width w, that all
      tokens went to. Attention keeps no matrix of scores.
    - logits: the vocabulary for each row of them.
    - CUDA: 0.5 GB on each device, for kernels, workspaces and what its allocator cannot use.
    """
    (kept, attended), hidden = attention_of(config), config.hidden_size
    widest = max(config_value(config, name) or 0 for name in MLP_WIDTHS)
    cached, prefill, rows = map(max, *extents, (0, 0, 0))
    layer = (10 + top_k) * max(hidden, attended // 2) + 4 * widest
    return {
        "KV cache": 2 * config.num_hidden_layers * kept * cached * width,
        "activations": layer * prefill * width,
        "logits": config.vocab_size * rows * width,
        "CUDA": CUDA_BYTES,
    }


def extent(schedule: Schedule, logs: bool = False) -> Extent:
    """Run through a schedule as if all requests were there; with `logs`, logits are kept."""
    cached = prefill = rows = pending = 0
    while step := schedule.next(math.inf, 0):
        pairs = zip(step.requests, step.generated, strict=True)
        lengths = [len(one.prompt) + made for one, made in pairs]
        cached = max(cached, len(lengths) * max(lengths))
        if step.phase == "prefill":
            prefill = max(prefill, sum(lengths))
        pending += len(lengths)
        rows = max(rows, pending if logs else len(lengths))
        pending *= not step.leaving
        schedule.done(step)
    return cached, prefill, rows


def shortage(
    devices: Sequence[torch.device], slots: Sequence[int], expert_bytes: int, beside: Parts
) -> str:
    """Return in words which device cannot hold its slots and the rest; nothing if all can."""
    experts: Counter[torch.device] = Counter()
    for device, count in zip(devices, slots, strict=True):
        experts[device] += count * expert_bytes
    for device, asked in experts.items():
        names = beside if device == devices[0] else ("activations", "CUDA")
        parts = {name: beside[name] for name in names if device.type == "cuda" or name != "CUDA"}
        needed, free = sum(parts.values()), free_bytes(device)
        if asked + needed > free:
            rest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
            has = f"has {free / 1e9:.1f} GB free, with {needed / 1e9:.1f} GB needed"
            return f"{asked / 1e9:.1f} GB of experts on {device}, which {has} beside them ({rest})"
    return ""


def load_setup(cfg: DictConfig, testbed: Testbed, load: Workload | None = None) -> LiveSetup:
    """Load the model, draw the workload, build the policy; raise UserError for what cannot be."""
    settings = build(cfg.workload)
    if testbed.threads is not None:
        torch.set_num_threads(testbed.threads)
    model = load_model(cfg.model, str(cfg.weights), testbed.devices[0], cfg.seed)
    shape = model.offloaded.shape
    full, devices = model.full_expert_bytes, testbed.devices
    policy, budget, slots = build_policy(cfg, shape, full, testbed)
    if policy.set_gates:
        what = f"system={cfg.system.label} cannot apply gates to hidden states"
        with refusing(what, ValueError, remedy="choose another system"):
            policy.set_gates(gate_weights(model.offloaded))
    load = load or settings.draw(build(cfg.dataset), model.tokenizer, cfg.seed)
    extents = [extent(settings.schedule(load.measured), bool(cfg.verify))]
    if policy.learn or cfg.record:
        extents.append(extent(settings.schedule(load.history, history=True)))
    if cfg.record and not settings.fixed:
        extents.append(extent(settings.recording(load)))
    own, nbytes = model.offloaded.model, model.offloaded.store.layout.nbytes
    text = own.config.get_text_config()
    beside = needed_beside(text, shape.top_k, own.dtype.itemsize, extents)
    if cause := shortage(devices, slots, nbytes, beside):
        raise UserError(f"the memory budget puts {cause}; {LESS}")
    everything = spread(shape, len(devices))
    resident = devices[0].type != "cuda" or not shortage(devices, everything, nbytes, beside)
    machine = None
    if policy.set_machine:
        machine = measured_machine(model.offloaded, testbed, slots, full)
        policy.set_machine(machine)
    memory = (shape, budget, slots, model.tokenizer, model, resident, machine)
    return LiveSetup(cfg, testbed, settings, load, policy, *memory)


@contextmanager
def prepare(cfg: DictConfig, testbed: Testbed, console: Console) -> Iterator[LiveSetup]:
    """Yield the setup of a run, gates overruled by `routing`; UserError if it cannot be."""
    try:
        with ExitStack() as stack:
            traced = traced_workload(cfg, console) if cfg.routing else None
            setup = load_setup(cfg, testbed, traced and traced[0])
            if traced:
                if setup.policy.placement.hidden_states:
                    why = "which do not lead to a trace's routing; simulate the testbed"
                    raise UserError(f"system={cfg.system.label} looks at hidden states, {why}")
                gates = stack.enter_context(TracedGates(setup.model.offloaded))
                setup.script = Script.of(cfg, *traced[1:], gates)
            yield setup
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).partition('. ')[0]}; {LESS}") from error
