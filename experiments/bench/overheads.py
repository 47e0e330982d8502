"""What the engine costs on top of plain transformers, and how measured checks are reported."""

from __future__ import annotations

import json
import random
import statistics
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from baselines.on_demand import OnDemandPolicy
from experiments.run.serving import Server
from experiments.run.weights import SCALE_MODELS, loading
from experiments.run.workloads import Request
from finemoe.assemble import resident_runtime
from finemoe.files import atomic_write
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Policy
from finemoe.policy import FineMoEOptions, FineMoEPolicy

SCALE_MODEL = SCALE_MODELS / "mixtral"
PREFETCH_DISTANCE = 3
"""d of Mixtral (section 6.1)."""
MOST_OVERHEAD = 1.10
"""Largest acceptable TPOT of the engine over that of plain transformers."""


@dataclass(frozen=True)
class Check:
    """One measured number and, if it has one, the bound that it should keep."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bound is kept; None if the number has none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Load:
    """One request of this shape is served in every round; round 0 only warms up."""

    prompt_tokens: int = 37
    new_tokens: int = 32
    rounds: int = 7


def request(number: int, load: Load, vocabulary: int) -> Request:
    """Return a prompt of random tokens that depends on its number alone."""
    tokens = random.Random(number).choices(range(vocabulary), k=load.prompt_tokens)
    return Request(number, tuple(tokens), load.new_tokens)


def scale_model(folder: Path) -> PreTrainedModel:
    """Return the model of a folder. Raises UserError if it has none."""
    with loading(f"the model of {folder}", "give the folder of a scale model"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


# Engine over plain transformers -----------------------------------------------------------------


class TokenTimes(BaseStreamer):
    """Takes the time of every token that `generate` hands out, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def tpot(self) -> float:
        """Return seconds per token after the first generated one."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def plain_tpot(model: Any, experts: str, asked: Request) -> float:
    """Return the TPOT of `generate`, greedy, with an experts implementation, in seconds."""
    model.set_experts_implementation(experts)
    tokens = torch.tensor([asked.prompt], device=model.device)
    times = TokenTimes()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=asked.output_tokens,
        streamer=times,
    )
    return times.tpot()


def engine_tpot(model: OffloadedModel, policy: Policy, asked: Request) -> float:
    """Return the TPOT of the engine with every expert resident, in seconds."""
    with resident_runtime(model, policy) as runtime:
        tpot = Server(runtime).serve([asked])[0].tpot
    assert tpot is not None
    return tpot


def two_policies(model: OffloadedModel, distance: int) -> dict[str, Policy]:
    """Return the policy that does least, and the paper's."""
    finemoe = FineMoEPolicy(model.shape, FineMoEOptions(distance))
    return {"on_demand": OnDemandPolicy(model.shape), "finemoe": finemoe}


def resident_overheads(
    build: Callable[[], PreTrainedModel], device: torch.device, load: Load
) -> list[Check]:
    """Compare engine and `generate`, round by round, with everything resident."""
    plain: Any = build()
    default: str = plain.config._experts_implementation
    plain.to(device).generation_config.eos_token_id = None
    plain.generation_config.pad_token_id = 0
    model = OffloadedModel.from_model(build(), device)
    policies = two_policies(model, PREFETCH_DISTANCE)
    baselines = {f"generate, {default}": default, "generate, eager": "eager"}
    vocabulary = plain.config.vocab_size
    rounds: list[dict[str, float]] = []
    for number in range(load.rounds + 1):
        asked = request(number, load, vocabulary)
        tpots = {name: plain_tpot(plain, kind, asked) for name, kind in baselines.items()}
        for name, policy in policies.items():
            tpots[name] = engine_tpot(model, policy, asked)
        rounds.append(tpots)
    return _compare(rounds[1:], list(policies), list(baselines))


def _compare(
    rounds: Sequence[dict[str, float]], systems: Sequence[str], baselines: Sequence[str]
) -> list[Check]:
    """Return medians over rounds: ratios taken within a round, and TPOT in ms."""
    checks = []
    for system in systems:
        for baseline in baselines:
            ratio = statistics.median(tpots[system] / tpots[baseline] for tpots in rounds)
            checks.append(Check(f"TPOT {system} / {baseline}", ratio, at_most=MOST_OVERHEAD))
    for name in (*baselines, *systems):
        median = statistics.median(tpots[name] for tpots in rounds)
        checks.append(Check(f"TPOT {name}", median * 1e3, "ms"))
    return checks


# Reports ----------------------------------------------------------------------------------------


def print_checks(title: str, checks: Sequence[Check], console: Console) -> None:
    """Print one row a check: what was measured, its target, and whether it is met."""
    table = Table("measured", "value", "target", "", title=title)
    words = {True: "[green]met[/]", False: "[red]falls short[/]", None: ""}
    for check in checks:
        value = f"{check.value:.4g} {check.unit}".strip()
        table.add_row(check.name, value, check.target, words[check.met])
    console.print(table)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file that is either whole or not there."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")


def parsed(
    module: str, doc: str | None, words: Sequence[str] | None, **known: tuple[Any, str]
) -> Namespace:
    """Parse a command's options: a default, whose type is theirs, and what each is for."""
    parser = ArgumentParser(
        f"python -m experiments.{module}",
        description=doc,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    for name, (default, told) in known.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=told)
    return parser.parse_args(words)
