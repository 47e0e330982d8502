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
from finemoe.offload.policy import Policy
from finemoe.trace import TracedRequest, TraceError, TraceHeader
from finemoe.traced_gates import GateStep, TracedGates


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


@dataclass(frozen=True)
class TracedWorkload:
    """The requests of a trace, read beforehand, so that no measured time has it in it."""

    cfg: DictConfig
    header: TraceHeader
    workload: Workload
    requests: dict[int, TracedRequest]

    def script(self, gates: TracedGates, model: OffloadedModel, policy: Policy) -> Script:
        """Return what a model is to do; raise UserError if it cannot, or the policy cannot."""
        if policy.placement.hidden_states:
            raise UserError(
                f"system={self.cfg.system.label} applies gates to hidden states, which do not lead "
                "to a trace's routing; replay it on a simulated testbed"
            )
        size = model.model.config.get_text_config().vocab_size
        traced = self.requests
        largest = max(token for one in traced.values() for token in (*one.prompt, *one.output))
        if largest >= size:
            raise UserError(
                f"the trace has token {largest}, the model only {size} of them; give a trace of a "
                "model with its vocabulary"
            )
        try:
            steps = {
                number: tuple(GateStep.of(step, model.shape.top_k) for step in one.steps)
                for number, one in traced.items()
            }
        except ValueError as error:
            cause = f"{self.cfg.routing}: {error}"
            raise UserError(f"{cause}; give a trace of a plain top-K model") from error
        origin = self.header.provenance
        words = f"a trace of {origin.get('model')} with weights {origin.get('weights')}"
        outputs = {number: one.output for number, one in traced.items()}
        return Script(gates, steps, outputs, words)


def traced_workload(
    cfg: DictConfig, settings: WorkloadSettings, console: Console
) -> TracedWorkload:
    """Read what a run asks of the trace that `routing` names; raise UserError or TraceError."""
    if not settings.fixed:
        raise UserError("routing= in a live run takes workload=offline; or simulate the testbed")
    if cfg.record:
        raise UserError("record=true would copy the trace of routing=; leave one of them out")
    if cfg.store.load or cfg.store.save:
        raise UserError("a store belongs to a model's own routing; leave store or routing= out")
    with open_routing(cfg, console) as trace:
        trace.require(("logits",))
        load = settings.traced(trace, cfg.seed)
        requests = (*load.history, *load.measured)
        traced = {one.number: traced_request(trace.request, one) for one in requests}
        lengths = {len(one.prompt) for one in traced.values()}
        if len(lengths) > 1 and max(cfg.workload.batch_size, cfg.workload.history_batch_size) > 1:
            raise TraceError(
                f"{trace.path}: has prompts of {min(lengths)} to {max(lengths)} tokens, which make "
                "no batch; set workload.batch_size=1 workload.history_batch_size=1"
            )
        return TracedWorkload(cfg, trace.header, prompted(load, trace), traced)
