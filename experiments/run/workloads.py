"""What is served: prompts in fixed batches, or requests that arrive over time (section 6.1).

A workload's option in conf/workload names one of these classes; another one needs the same methods.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from experiments.errors import UserError
from experiments.run.arrivals import Arrival, Process, generated, read_azure_trace, sampled
from experiments.run.datasets import Dataset, PromptSet, draw_prompts, template
from experiments.run.schedule import ContinuousBatches, FixedBatches, Request, Schedule, Served
from finemoe.options import CHECKED, Count, Number, Text, Whole
from finemoe.trace import Trace, TraceError

PASSAGE_END = "\n\n"
UNKNOWN = "unknown: a foreign trace"


@dataclass(frozen=True)
class Workload:
    """Requests that fill a system's history, those that warm the cache, those measured."""

    prompts: PromptSet
    history: tuple[Request, ...]
    warmup: tuple[Request, ...]
    measured: tuple[Request, ...]
    passes: int | None = 1
    """How often the prompts went through the dataset's texts; above 1, text is used again."""


class WorkloadSettings(ABC):
    """What a run needs of a workload's option, whatever it is."""

    fixed: ClassVar[bool]
    """Whether the iterations are known beforehand, however fast a system serves."""
    repeats: int = 1
    """How often the measured requests are served."""

    @abstractmethod
    def check(self, seed: int) -> None:
        """Raise UserError for a workload that cannot be."""

    @abstractmethod
    def draw(self, dataset: Dataset, tokenizer: Any, seed: int) -> Workload:
        """Draw the requests by seed; raise UserError if the dataset has not enough of them."""

    @abstractmethod
    def traced(self, trace: Trace, seed: int) -> Workload:
        """Return the requests whose prompts a trace holds; raise TraceError if it lacks some."""

    @abstractmethod
    def schedule(self, requests: Sequence[Request], history: bool = False) -> Schedule:
        """Return the iterations of requests, of the history or measured."""

    @abstractmethod
    def recording(self, load: Workload) -> Schedule:
        """Return the iterations in which the requests' routing is recorded for later replays."""

    @abstractmethod
    def lengths(self, seed: int) -> dict[str, Any]:
        """Return what the routing depends on, as plain data: not when requests arrive."""

    def arrivals(
        self, load: Workload, served: Sequence[Served], positions: int | None, seed: int
    ) -> Any:
        """Return what a run record says of requests that arrive over time; None without."""
        return None


@checked(frozen=True, config=CHECKED)
class Offline(WorkloadSettings):
    """Prompts of equal lengths in fixed batches; a share of them prepares the system."""

    fixed: ClassVar[bool] = True
    recording_batch: ClassVar[int] = 64

    prompts: Count
    history_share: Annotated[Number, Field(ge=0, lt=1)]
    input_tokens: Count
    output_tokens: Count
    batch_size: Count
    history_batch_size: Count
    warmup: Whole
    repeats: Count

    def check(self, seed: int) -> None:
        nowhere = PromptSet("", "", (), "")
        self._split(nowhere, [Request(n, (), 1) for n in range(self.prompts)])

    def draw(self, dataset: Dataset, tokenizer: Any, seed: int) -> Workload:
        drawn = draw_prompts(dataset, tokenizer, self.prompts, self.input_tokens, seed)
        order = list(range(self.prompts))
        random.Random(seed).shuffle(order)
        prompts = [drawn.prompts[index] for index in order]
        requests = [Request(n, prompt, self.output_tokens) for n, prompt in enumerate(prompts)]
        return self._split(drawn, requests)

    def traced(self, trace: Trace, seed: int) -> Workload:
        """Split the traced requests, which are numbered in the order of the split."""
        numbers = sorted(trace.numbers)
        if len(numbers) < self.prompts:
            raise TraceError(
                f"{trace.path}: holds {len(numbers)} requests, not {self.prompts}; "
                "lower workload.prompts"
            )
        requests = [Request(number, (), self.output_tokens) for number in numbers[: self.prompts]]
        return self._split(origin(trace), requests)

    def schedule(self, requests: Sequence[Request], history: bool = False) -> Schedule:
        return FixedBatches(requests, self.history_batch_size if history else self.batch_size)

    def recording(self, load: Workload) -> Schedule:
        return FixedBatches((*load.history, *load.measured), self.recording_batch)

    def lengths(self, seed: int) -> dict[str, Any]:
        names = ("prompts", "input_tokens", "output_tokens")
        return {name: getattr(self, name) for name in names}

    def _split(self, prompts: PromptSet, requests: list[Request]) -> Workload:
        """Let the first requests be the history; warm-ups are of them, so none is new."""
        share, cut = self.history_share, round(self.history_share * len(requests))
        if cut == len(requests):
            raise UserError(
                f"workload.history_share={share} of {len(requests)} prompts leaves none to measure"
            )
        if self.warmup > cut:
            raise UserError(
                f"workload.warmup={self.warmup}, but there are {cut} history prompts; lower it"
            )
        history, measured = tuple(requests[:cut]), tuple(requests[cut:])
        return Workload(prompts, history, history[: self.warmup], measured)


@checked(frozen=True, config=CHECKED)
class Online(WorkloadSettings):
    """Requests that arrive at a rate, with given lengths; nothing prepares the system."""

    fixed: ClassVar[bool] = False
    recording_batch: ClassVar[int] = 32
    """Smaller: requests of one batch are padded to the longest, perhaps thousands of tokens."""

    requests: Count
    rate: Annotated[Number, Field(ge=1e-6, le=1e6)]
    """Mean requests per second."""
    trace: Text | None
    """An Azure trace file; None for generated lengths."""
    arrival: Process
    max_batch_size: Count
    max_input_tokens: Count | None
    max_output_tokens: Count | None

    def __post_init__(self) -> None:
        if self.arrival == "trace" and self.trace is None:
            raise ValueError("arrival=trace needs trace=, a file; or set arrival=poisson")

    def check(self, seed: int) -> None:
        self.plan(seed)

    def draw(self, dataset: Dataset, tokenizer: Any, seed: int) -> Workload:
        plan = self.plan(seed)
        lengths = [arrival.input_tokens for arrival in plan]
        prompts, passes = prompts_of(lengths, dataset, tokenizer, seed)
        digest = hashlib.sha256(repr(prompts).encode()).hexdigest()
        drawn = PromptSet(dataset.name, dataset.source, tuple(prompts), digest)
        requests = tuple(
            Request(number, prompt, arrival.output_tokens, arrival.seconds)
            for number, (prompt, arrival) in enumerate(zip(prompts, plan, strict=True))
        )
        return Workload(drawn, (), (), requests, passes)

    def traced(self, trace: Trace, seed: int) -> Workload:
        requests = tuple(
            Request(number, (), one.output_tokens, one.seconds, one.input_tokens)
            for number, one in enumerate(self.plan(seed))
        )
        return Workload(origin(trace), (), (), requests, trace.header.provenance.get("passes"))

    def schedule(self, requests: Sequence[Request], history: bool = False) -> Schedule:
        return ContinuousBatches(requests, self.max_batch_size)

    def recording(self, load: Workload) -> Schedule:
        """As if all came at once, the longest prompts first, so that a batch pads little."""
        ordered = sorted(load.measured, key=lambda request: -len(request.prompt))
        waiting = [Request(one.number, one.prompt, one.output_tokens, 0.0) for one in ordered]
        return ContinuousBatches(waiting, self.recording_batch)

    def lengths(self, seed: int) -> dict[str, Any]:
        return {"online": [(one.input_tokens, one.output_tokens) for one in self.plan(seed)]}

    def plan(self, seed: int) -> list[Arrival]:
        """Draw arrivals and lengths by seed, in order of time; UserError for a bad trace."""
        return [self._capped(arrival) for arrival in self._drawn(seed)]

    def arrivals(
        self, load: Workload, served: Sequence[Served], positions: int | None, seed: int
    ) -> Any:
        """Return what was asked for and served; rates are in requests per second.

        Requests longer than the model's `positions` are served nevertheless: `positions_beyond`.
        """
        requests = sorted((one.request for one in served), key=lambda request: request.number)
        arrivals = [one.arrival or 0.0 for one in requests]
        ends = [(one.request.arrival or 0.0) + one.e2el for one in served]
        drawn = [(one.arrival, one.prompt, one.output_tokens) for one in requests]
        lengths = [len(one.prompt) + one.output_tokens for one in requests]
        span, name = max(arrivals) - min(arrivals), Path(self.trace or "").name
        return {
            "requests": len(requests),
            "source": f"{name}: sampled lengths, {self.arrival} arrivals"
            if self.trace
            else "generated: Poisson arrivals, log-normal lengths",
            "arrival": self.arrival,
            "sha256": hashlib.sha256(repr(drawn).encode()).hexdigest(),
            "passes": load.passes,
            "max_batch_size": self.max_batch_size,
            "max_input_tokens": self.max_input_tokens,
            "max_output_tokens": self.max_output_tokens,
            "shortened": sum(self._capped(one) != one for one in self._drawn(seed)),
            "max_positions": positions,
            "positions_beyond": positions and sum(length > positions for length in lengths),
            "rate": self.rate,
            "realised_rate": (len(arrivals) - 1) / span if span else None,
            "served_rate": len(served) / max(ends),
        }

    def _drawn(self, seed: int) -> tuple[Arrival, ...]:
        if self.trace is None:
            return generated(self.requests, self.rate, seed)
        rows = read_azure_trace(Path(self.trace))
        return sampled(rows, self.requests, self.rate, self.arrival, seed)

    def _capped(self, arrival: Arrival) -> Arrival:
        return Arrival(
            arrival.seconds,
            min(arrival.input_tokens, self.max_input_tokens or arrival.input_tokens),
            min(arrival.output_tokens, self.max_output_tokens or arrival.output_tokens),
        )


def origin(trace: Trace) -> PromptSet:
    """Return what a trace says of where its prompts come from, without them."""
    said = trace.header.provenance
    names = ("dataset", "dataset_source", "dataset_sha256")
    dataset, source, sha256 = (str(said.get(name, UNKNOWN)) for name in names)
    return PromptSet(dataset, source, (), sha256)


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
            tokens = 0
            for text in (*texts[start:], *texts[:start]):
                ids = self._tokenizer(text + PASSAGE_END, add_special_tokens=False)["input_ids"]
                tokens += len(ids)
                yield ids
            if not tokens:
                raise UserError(f"the texts of {self._dataset.name} hold no token")
