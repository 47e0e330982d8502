"""Routing traces of runs: recorded while a model serves, kept for replays, imposed on live runs."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from omegaconf import DictConfig
from torch import Tensor

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError, refusing
from experiments.run.config import build, values_of
from experiments.run.console import Console
from experiments.run.models import LoadedModel, free_bytes, load_model
from experiments.run.records import check_writable, provenance
from experiments.run.schedule import Request, Schedule, Server, Step
from experiments.run.testbeds import local
from experiments.run.weights import fingerprint
from experiments.run.workloads import Workload, WorkloadSettings
from finemoe import trace as traces
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.foreign_trace import STREAMS, foreign_trace, is_foreign, routed_stream
from finemoe.offload.budget import BudgetError, plan_slots
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import ModelShape
from finemoe.recorder import Recorder, gate_weights
from finemoe.testbed import cuda_devices
from finemoe.trace import Trace, TracedRequest, TraceError
from finemoe.traced_gates import GateStep, TracedGates

SHARE = 0.8  # of a GPU's free memory that experts may take while routing is recorded


def open_routing(cfg: DictConfig, console: Console) -> Trace:
    """Open the trace that `routing` names, or the kept one; raise TraceError or UserError."""
    path = Path(cfg.routing) if cfg.routing else kept_trace(cfg, console)
    shape = ModelShape(cfg.model.layers, cfg.model.experts, cfg.model.top_k, 0)
    if cfg.routing and path.suffix in STREAMS:
        lengths = (cfg.workload.get(f"{kind}_tokens") or 1 for kind in ("input", "output"))
        return routed_stream(path, shape, *lengths)
    if cfg.routing and is_foreign(path):
        return foreign_trace(path, shape)
    reader = traces.TraceReader(path)
    reader.require(shape=shape)
    return reader


def kept_trace(cfg: DictConfig, console: Console) -> Path:
    """Return the kept trace of these weights, dataset and workload; record it if it is missing."""
    settings: WorkloadSettings = build(cfg.workload)
    path = _path(cfg, settings)
    if path.exists():
        return path
    check_writable(Path(cfg.traces), "traces")
    device = torch.device("cuda:0" if cuda_devices() else "cpu")
    with _one_thread():
        model = load_model(cfg.model, str(cfg.weights), device, cfg.seed)
        load = settings.draw(build(cfg.dataset), model.tokenizer, cfg.seed)
        # Loading may have downloaded weights whose revision was not known before.
        path = _path(cfg, settings)
        console.announce([f"recording the routing once, to {path}"])
        # Runs of one sweep may record the same trace at the same time; the last keeps its name.
        with _recording_runtime(model.offloaded) as runtime:
            record(cfg, runtime, model, load, [settings.recording(load)], path, console)
    return path


@contextmanager
def _one_thread() -> Iterator[None]:
    """A sum's last bits depend on torch's threads, and so would tokens that nearly tie."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _recording_runtime(model: OffloadedModel) -> LiveRuntime:
    """Return a runtime with as many experts resident as fit; UserError if a token's do not."""
    policy, nbytes = OnDemandPolicy(model.shape), model.store.layout.nbytes
    if model.device.type != "cuda":
        return resident_runtime(model, policy)
    testbed = local(None, None)
    each = min(int(SHARE * free_bytes(device)) // nbytes for device in testbed.devices)
    count = len(testbed.devices)
    remedy = "record on a larger one, or give routing="
    with refusing("the GPUs cannot hold a token's experts", BudgetError, remedy=remedy):
        slots = plan_slots(each * count * nbytes, nbytes, model.shape, count)
    return offloading_runtime(model, policy, testbed, slots, nbytes)


def _path(cfg: DictConfig, settings: WorkloadSettings) -> Path:
    model = values_of(cfg.model)
    # Routing does not depend on them.
    for name in ("prefetch_distance", "facts"):
        model.pop(name, None)
    asked = {
        "model": model,
        "weights": str(cfg.weights),
        "fingerprint": fingerprint(cfg.model, str(cfg.weights), cfg.seed),
        "dataset": values_of(cfg.dataset),
        "seed": cfg.seed,
        **settings.lengths(cfg.seed),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cfg.traces) / f"{cfg.model.name}-{cfg.dataset.name}-{digest}.parquet"


def record(
    cfg: DictConfig,
    runtime: LiveRuntime,
    model: LoadedModel,
    load: Workload,
    schedules: Iterable[Schedule],
    path: Path,
    console: Console,
) -> None:
    """Serve schedules and write what each request routed; the file appears when complete."""
    from experiments.run.live import LiveBackend

    origin = {
        "model": cfg.model.name,
        "weights": str(cfg.weights),
        **load.origin,
        "seed": cfg.seed,
        "dense_bytes": model.offloaded.dense_bytes,
        "passes": load.passes,
        "positions": model.positions,
        "cast": model.cast,
        **provenance(),
    }
    gates, write = None, None
    with suppress(ValueError):  # Who applies them to hidden states has no use for such a trace.
        gates = gate_weights(model.offloaded)
    progress = console.progress("recording", len(load.history) + len(load.measured))
    with ExitStack() as stack, Recorder(runtime.model) as recorder, progress as advance:
        server = Server(LiveBackend(runtime, before=lambda step: recorder.begin(step.iteration)))
        for one in chain.from_iterable(map(server.serve, schedules)):
            if write is None:
                # Gates may compute in a wider dtype than the model's, which is known by now.
                facts = (model.offloaded.shape, recorder.dtype, traces.CONTENTS, origin, gates)
                write = stack.enter_context(traces.trace_writer(path, traces.TraceHeader(*facts)))
            write(recorder.finish(one.request.number, one.request.prompt, one.tokens))
            advance(1)


def traced_request(fetch: Callable[[int], TracedRequest], request: Request) -> TracedRequest:
    """Return what a trace holds of a request; TraceError if its lengths are not those asked for."""
    traced = fetch(request.number)
    prompt, answer = len(traced.prompt), len(traced.steps)
    if answer < request.output_tokens or request.input_tokens not in (None, prompt):
        asked = f"{request.output_tokens} output tokens; lower workload.output_tokens"
        if request.input_tokens is not None:
            remedy = "set routing=null to record one for it"
            asked = f"{request.input_tokens} and {request.output_tokens}; {remedy}"
        holds = f"request {request.number} with {prompt} input and {answer} output tokens"
        raise TraceError(f"the trace holds {holds}, the workload asks for {asked}")
    return traced


@dataclass(frozen=True)
class Script:
    """What requests are to route and to say, by their number, step by step."""

    gates: TracedGates
    steps: dict[int, tuple[GateStep, ...]]
    outputs: dict[int, tuple[int, ...]]
    routing: str  # where that comes from, in words

    def begin(self, step: Step) -> None:
        """Tell the gates what to choose in a step."""
        pairs = zip(step.requests, step.generated, strict=True)
        self.gates.begin(step.iteration, [self.steps[one.number][made] for one, made in pairs])

    def tokens(self, step: Step, logits: Tensor) -> list[int]:
        """Return the trace's tokens of a step."""
        pairs = zip(step.requests, step.generated, strict=True)
        return [self.outputs[one.number][made] for one, made in pairs]

    @classmethod
    def of(
        cls, cfg: DictConfig, traced: Sequence[TracedRequest], routing: str, gates: TracedGates
    ) -> Self:
        """Return what the gates' model is to do; raise UserError if it cannot."""
        model = gates.model
        size = model.model.config.get_text_config().vocab_size
        largest = max(token for one in traced for token in (*one.prompt, *one.output))
        if largest >= size:
            cause = f"the trace has token {largest}, the model only {size} of them"
            raise UserError(f"{cause}; give a trace of a model with its vocabulary")
        with refusing(str(cfg.routing), ValueError, remedy="give one of a plain top-K model"):
            steps = {
                one.number: tuple(GateStep.of(step, model.shape.top_k) for step in one.steps)
                for one in traced
            }
        return cls(gates, steps, {one.number: one.output for one in traced}, routing)


def traced_workload(cfg: DictConfig, console: Console) -> tuple[Workload, list[TracedRequest], str]:
    """Read the requests that a run asks of a trace, and what it is of, before any is served."""
    settings: WorkloadSettings = build(cfg.workload)
    if not settings.fixed:
        raise UserError("routing= in a live run takes workload=offline; or simulate the testbed")
    if cfg.record:
        raise UserError("record=true would copy the trace of routing=; leave one of them out")
    if cfg.store.load or cfg.store.save:
        raise UserError("a store belongs to a model's own routing; leave store or routing= out")
    with open_routing(cfg, console) as trace:
        trace.require(("logits",))
        load, origin = settings.traced(trace, cfg.seed), trace.header.provenance
        requests = (*load.history, *load.measured)
        traced = [traced_request(trace.request, one) for one in requests]
        lengths = {len(one.prompt) for one in traced}
        if len(lengths) > 1 and max(cfg.workload.batch_size, cfg.workload.history_batch_size) > 1:
            cause = f"has prompts of {min(lengths)} to {max(lengths)} tokens, which make no batch"
            remedy = "set workload.batch_size=1 workload.history_batch_size=1"
            raise TraceError(f"{trace.path}: {cause}; {remedy}")
        routing = f"a trace of {origin.get('model')} with weights {origin.get('weights')}"
        return load, traced, routing
