"""A live run whose every routing decision comes from a trace: realistic routing, no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig
from torch import Tensor

from experiments.errors import UserError
from experiments.run.console import Console
from experiments.run.replay import traced_request
from experiments.run.routing import open_routing
from experiments.run.schedule import Step
from experiments.run.workloads import Workload, WorkloadSettings, prompted
from finemoe.offload.model import OffloadedModel
from finemoe.trace import TracedRequest, TraceError
from finemoe.traced_gates import GateStep, TracedGates

Traced = dict[int, TracedRequest]  # by the numbers of the requests


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


def script(
    cfg: DictConfig, traced: Traced, routing: str, gates: TracedGates, model: OffloadedModel
) -> Script:
    """Return what a model is to do; raise UserError if it cannot."""
    size = model.model.config.get_text_config().vocab_size
    largest = max(token for one in traced.values() for token in (*one.prompt, *one.output))
    if largest >= size:
        cause = f"the trace has token {largest}, the model only {size} of them"
        raise UserError(f"{cause}; give a trace of a model with its vocabulary")
    try:
        steps = {
            number: tuple(GateStep.of(step, model.shape.top_k) for step in one.steps)
            for number, one in traced.items()
        }
    except ValueError as error:
        raise UserError(f"{cfg.routing}: {error}; give a trace of a plain top-K model") from error
    return Script(gates, steps, {number: one.output for number, one in traced.items()}, routing)


def traced_workload(
    cfg: DictConfig, settings: WorkloadSettings, console: Console
) -> tuple[Workload, Traced, str]:
    """Read the requests that a run asks of the trace that `routing` names, and what it is of.

    Beforehand, so that no measured time has it in it. Raises UserError or TraceError.
    """
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
        traced = {one.number: traced_request(trace.request, one) for one in requests}
        lengths = {len(one.prompt) for one in traced.values()}
        if len(lengths) > 1 and max(cfg.workload.batch_size, cfg.workload.history_batch_size) > 1:
            cause = f"has prompts of {min(lengths)} to {max(lengths)} tokens, which make no batch"
            remedy = "set workload.batch_size=1 workload.history_batch_size=1"
            raise TraceError(f"{trace.path}: {cause}; {remedy}")
        routing = f"a trace of {origin.get('model')} with weights {origin.get('weights')}"
        return prompted(load, trace), traced, routing
