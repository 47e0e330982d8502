"""A live run whose every routing decision comes from a trace: realistic routing, no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.errors import UserError
from experiments.run.config import workload_settings
from experiments.run.console import Console
from experiments.run.datasets import PromptSet
from experiments.run.online import is_online
from experiments.run.replay_serving import fetch_all
from experiments.run.routing_source import open_routing
from experiments.run.serving import Runtime, Server
from experiments.run.setup import Setup, prepare_engine
from experiments.run.workloads import OfflineSettings, Request, split
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Iteration
from finemoe.testbed import Testbed
from finemoe.trace import Trace, TracedRequest, TraceError
from finemoe.traced_gates import GateStep, TracedGates


@dataclass(frozen=True)
class Script:
    """What one traced request is to route and to say, step by step."""

    steps: tuple[GateStep, ...]
    output: tuple[int, ...]


@dataclass
class Prompter:
    """Tells the gates, and the server that it belongs to, what the trace says of each step."""

    gates: TracedGates
    scripts: Mapping[int, Script]
    """By number of the request."""
    step: int = 0
    requests: tuple[int, ...] = ()

    def begin(self, iteration: Iteration) -> None:
        """Go on to the next step, the first one if a batch begins."""
        self.step = 0 if iteration.phase == "prefill" else self.step + 1
        self.requests = iteration.requests
        steps = [self.scripts[number].steps[self.step] for number in self.requests]
        self.gates.begin(iteration, steps)

    def choose(self, logits: Tensor) -> Tensor:
        """Return the trace's tokens of this step, shape (B, 1)."""
        said = [[self.scripts[number].output[self.step]] for number in self.requests]
        return torch.tensor(said, device=logits.device)


@contextmanager
def traced_setup(cfg: DictConfig, testbed: Testbed, console: Console) -> Iterator[Setup]:
    """Build a live run whose requests and routing are those of the trace that `routing` names.

    Within the block the model's gates are overruled. Raises UserError for anything that cannot be.
    """
    _check(cfg)
    settings = workload_settings(cfg.workload)
    try:
        with open_routing(cfg, console) as trace:
            trace.require(("logits",))
            traced = _read(trace, settings)
            origin = dict(trace.header.provenance)
            engine = prepare_engine(cfg, testbed)
            if engine.policy.placement.hidden_states:
                raise UserError(
                    f"system={cfg.system.label} applies gates to hidden states, which do not lead "
                    "to a trace's routing; replay it on a simulated testbed"
                )
            model = engine.model.offloaded
            trace.require(("logits",), shape=model.shape)
    except TraceError as error:
        raise UserError(str(error)) from error
    _check_vocabulary(model, traced)
    requests = [Request(one.number, one.prompt, settings.output_tokens) for one in traced]
    scripts = _scripts(cfg, model, traced, settings.output_tokens)
    with TracedGates(model) as gates:

        def server(runtime: Runtime) -> Server:
            prompter = Prompter(gates, scripts)
            return Server(runtime, listeners=[prompter.begin], choose=prompter.choose)

        yield Setup(
            **vars(engine),
            prompts=_prompts(origin, traced),
            settings=settings,
            workload=split(requests, settings),
            server=server,
            routing=f"a trace of {origin.get('model')} with weights {origin.get('weights')}",
        )


def _check(cfg: DictConfig) -> None:
    if is_online(cfg):
        raise UserError("routing= in a live run takes workload=offline; or simulate the testbed")
    if cfg.system.get("runtime") == "deepspeed":
        raise UserError(f"system={cfg.system.label} follows no trace; leave routing= out")
    if cfg.record:
        raise UserError("record=true would copy the trace of routing=; leave one of them out")
    if cfg.store.load or cfg.store.save:
        raise UserError("a store belongs to a model's own routing; leave store or routing= out")


def _read(trace: Trace, settings: OfflineSettings) -> list[TracedRequest]:
    """Return the workload's requests; read beforehand, so that no measured time has it in it."""
    numbers = sorted(trace.numbers)[: settings.prompts]
    if len(numbers) < settings.prompts:
        raise TraceError(
            f"{trace.path}: holds {len(numbers)} requests, not {settings.prompts}; "
            "lower workload.prompts"
        )
    asked = [Request(number, (), settings.output_tokens) for number in numbers]
    traced = fetch_all(asked, trace.request)
    lengths = {len(one.prompt) for one in traced}
    if len(lengths) > 1 and max(settings.batch_size, settings.history_batch_size) > 1:
        raise TraceError(
            f"{trace.path}: has prompts of {min(lengths)} to {max(lengths)} tokens, which make no "
            "batch; set workload.batch_size=1 workload.history_batch_size=1"
        )
    return traced


def _check_vocabulary(model: OffloadedModel, traced: Sequence[TracedRequest]) -> None:
    size = model.model.config.get_text_config().vocab_size
    largest = max(token for one in traced for token in (*one.prompt, *one.output))
    if largest >= size:
        raise UserError(
            f"the trace has token {largest}, the model only {size} of them; give a trace of a "
            "model with its vocabulary"
        )


def _scripts(
    cfg: DictConfig, model: OffloadedModel, traced: Sequence[TracedRequest], tokens: int
) -> dict[int, Script]:
    top_k = model.shape.top_k
    try:
        return {
            one.number: Script(
                tuple(GateStep.of(step, top_k) for step in one.steps[:tokens]), one.output
            )
            for one in traced
        }
    except ValueError as error:
        raise UserError(f"{cfg.routing}: {error}; give a trace of a plain top-K model") from error


def _prompts(origin: Mapping[str, object], traced: Sequence[TracedRequest]) -> PromptSet:
    named = (str(origin.get(key)) for key in ("dataset", "dataset_source", "dataset_sha256"))
    dataset, source, sha256 = named
    return PromptSet(dataset, source, tuple(one.prompt for one in traced), sha256)
