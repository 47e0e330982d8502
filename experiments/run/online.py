"""The online workload: requests that arrive over time, with given lengths (section 6.1)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from experiments.errors import UserError
from experiments.run.arrivals import Arrival, Process, generated, read_azure_trace, sampled
from experiments.run.datasets import Dataset, PromptSet, template
from experiments.run.workloads import Request
from finemoe.options import CHECKED, Count, Number, Text

PASSAGE_END = "\n\n"
GENERATED = "generated: Poisson arrivals, log-normal lengths"


@checked(frozen=True, config=CHECKED)
class OnlineSettings:
    """What conf/workload/online.yaml sets."""

    requests: Count
    rate: Annotated[Number, Field(ge=1e-6, le=1e6)]
    """Mean requests a second."""
    trace: Text | None
    """An Azure trace file; None for generated lengths."""
    arrival: Process
    max_batch_size: Count
    max_input_tokens: Count | None
    max_output_tokens: Count | None

    def __post_init__(self) -> None:
        if self.arrival == "trace" and self.trace is None:
            raise ValueError("arrival=trace needs trace=, a file; or set arrival=poisson")


@dataclass(frozen=True)
class TimedRequest(Request):
    """A request that comes `arrival` seconds after serving began."""

    arrival: float


@dataclass(frozen=True)
class ArrivalPlan:
    """Arrivals in order of time, their lengths already capped, and where they come from."""

    arrivals: tuple[Arrival, ...]
    source: str
    shortened: int
    """How many requests a cap made shorter than the trace or the generator has them."""


@dataclass(frozen=True)
class OnlineWorkload:
    """Requests in order of arrival, where their times and lengths come from, and their hash."""

    requests: tuple[TimedRequest, ...]
    source: str
    shortened: int
    """How many requests a cap made shorter than the trace or the generator has them."""
    passes: int | None
    """How often the prompts went through the dataset's texts; above 1, text is used again."""

    @property
    def sha256(self) -> str:
        """Of arrivals, prompts and output lengths."""
        drawn = [(one.arrival, one.prompt, one.output_tokens) for one in self.requests]
        return hashlib.sha256(repr(drawn).encode()).hexdigest()

    def prompt_set(self, dataset: Dataset) -> PromptSet:
        """Return the prompts, in order of arrival, as what was drawn from a dataset."""
        prompts = tuple(one.prompt for one in self.requests)
        digest = hashlib.sha256(repr(list(prompts)).encode()).hexdigest()
        return PromptSet(dataset.name, dataset.source, prompts, digest)


def is_online(cfg: DictConfig) -> bool:
    """Tell whether the workload of a run is one of requests that arrive at a rate."""
    return "rate" in cfg.workload


def online(dataset: Dataset, tokenizer: Any, settings: OnlineSettings, seed: int) -> OnlineWorkload:
    """Draw requests by seed: arrivals and lengths as set, prompts of exactly those lengths.

    Raises UserError for settings out of range, a malformed trace, or texts without a token.
    """
    plan = planned(settings, seed)
    lengths = [arrival.input_tokens for arrival in plan.arrivals]
    prompts, passes = prompts_of(lengths, dataset, tokenizer, seed)
    requests = tuple(
        TimedRequest(number, prompt, arrival.output_tokens, arrival.seconds)
        for number, (prompt, arrival) in enumerate(zip(prompts, plan.arrivals, strict=True))
    )
    return OnlineWorkload(requests, plan.source, plan.shortened, passes)


def planned(settings: OnlineSettings, seed: int) -> ArrivalPlan:
    """Draw arrivals and lengths by seed; UserError for a bad trace."""
    arrivals, source = _arrivals(settings, seed)
    capped = tuple(_capped(arrival, settings) for arrival in arrivals)
    shortened = sum(a != b for a, b in zip(arrivals, capped, strict=True))
    return ArrivalPlan(capped, source, shortened)


def prompts_of(
    lengths: Sequence[int], dataset: Dataset, tokenizer: Any, seed: int
) -> tuple[list[tuple[int, ...]], int]:
    """Return one prompt of exactly each length, and how many passes over the texts that took.

    A prompt is a run of consecutive texts, joined by blank lines and cut at its end. The next
    prompt goes on with the next text, so that no text is used twice before all were; where the
    first starts, and which request gets which run, is drawn by seed. The chat template is counted
    in; a prompt without room for it and one more token goes without. Raises UserError if the texts
    hold no token.
    """
    before, after = template(tokenizer)
    order = list(range(len(lengths)))
    draw = random.Random(seed)
    draw.shuffle(order)
    walk = _Walk(dataset, tokenizer, draw.randrange(len(dataset.texts)))
    prompts: dict[int, tuple[int, ...]] = {}
    for index in order:
        room = lengths[index] - len(before) - len(after)
        if room >= 1:
            prompts[index] = (*before, *walk.take(room), *after)
        else:
            prompts[index] = walk.take(lengths[index])
    return [prompts[index] for index in range(len(lengths))], walk.passes


class _Walk:
    """Goes through the texts of a dataset, round and round, and counts the rounds."""

    def __init__(self, dataset: Dataset, tokenizer: Any, start: int) -> None:
        self.passes = 0
        self._dataset, self._tokenizer = dataset, tokenizer
        self._passages = self._rounds(start)

    def take(self, tokens: int) -> tuple[int, ...]:
        """Return exactly so many tokens, from the start of the next text on."""
        taken: list[int] = []
        while len(taken) < tokens:
            taken += next(self._passages)
        return tuple(taken[:tokens])

    def _rounds(self, start: int) -> Iterator[list[int]]:
        texts = self._dataset.texts
        while True:
            self.passes += 1
            found = 0
            for text in (*texts[start:], *texts[:start]):
                ids = self._tokenizer(text + PASSAGE_END, add_special_tokens=False)["input_ids"]
                found += len(ids)
                yield ids
            if not found:
                raise UserError(f"the texts of {self._dataset.name} hold no token")


def _arrivals(settings: OnlineSettings, seed: int) -> tuple[tuple[Arrival, ...], str]:
    count, rate = settings.requests, settings.rate
    if settings.trace is None:
        return generated(count, rate, seed), GENERATED
    path = Path(settings.trace)
    arrivals = sampled(read_azure_trace(path), count, rate, settings.arrival, seed)
    return arrivals, f"{path.name}: sampled lengths, {settings.arrival} arrivals"


def _capped(arrival: Arrival, settings: OnlineSettings) -> Arrival:
    return Arrival(
        arrival.seconds,
        min(arrival.input_tokens, settings.max_input_tokens or arrival.input_tokens),
        min(arrival.output_tokens, settings.max_output_tokens or arrival.output_tokens),
    )
