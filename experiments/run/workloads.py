"""What is served: prompts in fixed batches, or requests that arrive over time (section 6.1)."""

import hashlib
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from experiments.errors import UserError, refusing
from experiments.run.datasets import Dataset, draw_prompts, origin_of, prompts_of, shared_prefixes
from experiments.run.schedule import ContinuousBatches, FixedBatches, Request, Schedule, Served
from finemoe.options import CHECKED, Count, Number, Text, Whole
from finemoe.trace import Trace, TraceError

Process = Literal["poisson", "trace"]

TIME, INPUT, OUTPUT = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
LONGEST = 2**31
# Mean and deviation of ln tokens over the conversation trace of 2023, and its largest: a stand-in,
# as the trace has several modes (Kolmogorov-Smirnov distance 0.16 and 0.18).
CONVERSATIONS = {"input_tokens": (6.6333, 0.9852, 14050), "output_tokens": (5.0190, 0.8590, 1000)}


@dataclass(frozen=True)
class Workload:
    """Requests that fill a system's history, those that warm the cache, those measured."""

    origin: Mapping[str, str]  # of the prompts: dataset, dataset_source, dataset_sha256
    history: tuple[Request, ...]
    warmup: tuple[Request, ...]
    measured: tuple[Request, ...]
    passes: int | None = 1  # through the dataset's texts; above 1, text is used again

    def shared_prefix(self) -> dict[str, float] | None:
        """Return how long a prefix measured prompts share with any other, history included.

        In tokens, and as the mean share of a prompt; None without prompts, as in foreign traces.
        """
        lengths = [len(one.prompt) for one in self.measured]
        if not all(lengths):
            return None
        every = [one.prompt for one in (*self.measured, *self.history)]
        shared = shared_prefixes(every)[: len(lengths)]
        return {
            "mean_tokens": float(np.mean(shared)),
            "longest_tokens": max(shared),
            "mean_share": float(np.divide(shared, lengths).mean()),
        }


class WorkloadSettings(ABC):
    """What a run needs of a workload's option, whatever it is."""

    fixed: ClassVar[bool]  # whether iterations are known beforehand, however fast a system serves
    repeats: int = 1  # how often the measured requests are served

    @abstractmethod
    def check(self, seed: int) -> None:
        """Raise UserError for a workload that cannot be."""

    @abstractmethod
    def draw(self, dataset: Dataset, tokenizer: Any, seed: int) -> Workload:
        """Draw the requests by seed; raise UserError if the dataset has not enough of them."""

    @abstractmethod
    def traced(self, trace: Trace, seed: int) -> Workload:
        """Return requests with their prompts in a trace; raise TraceError if it lacks some."""

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
        self._split({}, [Request(n, (), 1) for n in range(self.prompts)])

    def draw(self, dataset: Dataset, tokenizer: Any, seed: int) -> Workload:
        drawn = draw_prompts(dataset, tokenizer, self.prompts, self.input_tokens, seed)
        origin, prompts = origin_of(dataset, drawn), drawn.copy()
        random.Random(seed).shuffle(prompts)
        requests = [Request(n, prompt, self.output_tokens) for n, prompt in enumerate(prompts)]
        return self._split(origin, requests)

    def traced(self, trace: Trace, seed: int) -> Workload:
        """Split the traced requests, which are numbered in the order of the split."""
        numbers = sorted(trace.numbers)
        if len(numbers) < self.prompts:
            cause = f"{trace.path}: holds {len(numbers)} requests, not {self.prompts}"
            raise TraceError(f"{cause}; lower workload.prompts")
        chosen = ((number, trace.prompt(number)) for number in numbers[: self.prompts])
        return self._split(origin_in(trace), [Request(*one, self.output_tokens) for one in chosen])

    def schedule(self, requests: Sequence[Request], history: bool = False) -> Schedule:
        return FixedBatches(requests, self.history_batch_size if history else self.batch_size)

    def recording(self, load: Workload) -> Schedule:
        return FixedBatches((*load.history, *load.measured), self.recording_batch)

    def lengths(self, seed: int) -> dict[str, Any]:
        names = ("prompts", "input_tokens", "output_tokens")
        return {name: getattr(self, name) for name in names}

    def _split(self, origin: Mapping[str, str], requests: list[Request]) -> Workload:
        share, cut = self.history_share, round(self.history_share * len(requests))
        if cut == len(requests):
            raise UserError(
                f"workload.history_share={share} of {cut} prompts leaves none to measure"
            )
        if self.warmup > cut:
            cause = f"workload.warmup={self.warmup} of {cut} history prompts"
            raise UserError(f"{cause}; set workload.warmup={cut}")
        history, measured = tuple(requests[:cut]), tuple(requests[cut:])
        return Workload(origin, history, history[: self.warmup], measured)


@checked(frozen=True, config=CHECKED)
class Online(WorkloadSettings):
    """Requests that arrive at a rate, with given lengths; nothing prepares the system."""

    fixed: ClassVar[bool] = False
    recording_batch: ClassVar[int] = 32  # smaller, as the longest pads the others

    requests: Count
    rate: Annotated[Number, Field(ge=1e-6, le=1e6)]  # mean requests per second
    trace: Text | None  # an Azure trace file; None for generated lengths
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
        requests = self._requests(seed)
        lengths = [request.input_tokens or 0 for request in requests]
        drawn, passes = prompts_of(lengths, dataset, tokenizer, seed)
        pairs = zip(requests, drawn, strict=True)
        measured = (replace(one, prompt=prompt, input_tokens=None) for one, prompt in pairs)
        return Workload(origin_of(dataset, drawn), (), (), tuple(measured), passes)

    def traced(self, trace: Trace, seed: int) -> Workload:
        requests = (replace(one, prompt=trace.prompt(one.number)) for one in self._requests(seed))
        passes = trace.header.provenance.get("passes")
        return Workload(origin_in(trace), (), (), tuple(requests), passes)

    def schedule(self, requests: Sequence[Request], history: bool = False) -> Schedule:
        return ContinuousBatches(requests, self.max_batch_size)

    def recording(self, load: Workload) -> Schedule:
        """As if all came at once, the longest prompts first, so that a batch pads little."""
        ordered = sorted(load.measured, key=lambda request: -len(request.prompt))
        waiting = [Request(one.number, one.prompt, one.output_tokens, 0.0) for one in ordered]
        return ContinuousBatches(waiting, self.recording_batch)

    def lengths(self, seed: int) -> dict[str, Any]:
        return {"online": self.plan(seed)[["input_tokens", "output_tokens"]].to_numpy().tolist()}

    def plan(self, seed: int) -> pd.DataFrame:
        """Draw arrivals and lengths by seed, as `read_azure_trace` has them, under the caps."""
        rows = self._drawn(seed)
        inputs = rows["input_tokens"].clip(upper=self.max_input_tokens)
        outputs = rows["output_tokens"].clip(upper=self.max_output_tokens)
        return rows.assign(input_tokens=inputs, output_tokens=outputs)

    def _drawn(self, seed: int) -> pd.DataFrame:
        if self.trace is None:
            return generated(self.requests, self.rate, seed)
        trace = read_azure_trace(Path(self.trace))
        return sampled(trace, self.requests, self.rate, self.arrival, seed)

    def _requests(self, seed: int) -> tuple[Request, ...]:
        rows = self.plan(seed)[["output_tokens", "seconds", "input_tokens"]].itertuples(index=False)
        return tuple(Request(number, (), *row) for number, row in enumerate(rows))

    def arrivals(
        self, load: Workload, served: Sequence[Served], positions: int | None, seed: int
    ) -> Any:
        """Return what was asked for and served; rates are in requests per second."""
        requests, arrivals = load.measured, [one.arrival or 0.0 for one in load.measured]
        ends = [(one.request.arrival or 0.0) + one.e2el for one in served]
        drawn = [(one.arrival, one.prompt, one.output_tokens) for one in requests]
        lengths = [len(one.prompt) + one.output_tokens for one in requests]
        span = max(arrivals) - min(arrivals)
        source = "generated: Poisson arrivals, log-normal lengths"
        if self.trace:
            source = f"{Path(self.trace).name}: sampled lengths, {self.arrival} arrivals"
        return {
            "requests": len(requests),
            "source": source,
            "arrival": self.arrival,
            "sha256": hashlib.sha256(repr(drawn).encode()).hexdigest(),
            "passes": load.passes,
            "max_batch_size": self.max_batch_size,
            "max_input_tokens": self.max_input_tokens,
            "max_output_tokens": self.max_output_tokens,
            "shortened": int((self.plan(seed) != self._drawn(seed)).any(axis=1).sum()),
            "max_positions": positions,
            "positions_beyond": positions and sum(length > positions for length in lengths),
            "rate": self.rate,
            "realised_rate": (len(arrivals) - 1) / span if span else None,
            "served_rate": len(served) / max(ends),
        }


def origin_in(trace: Trace) -> dict[str, str]:
    """Return what a trace says of where its prompts come from."""
    said, unknown = trace.header.provenance, "unknown: a foreign trace"
    names = ("dataset", "dataset_source", "dataset_sha256")
    return {name: str(said.get(name, unknown)) for name in names}


def read_azure_trace(path: Path) -> pd.DataFrame:
    """Return `seconds` since the first request, `input_tokens`, `output_tokens`, in order of time.

    Raises UserError for a file that is missing, empty or no table, lacks a column, or has, in which
    line, an unreadable time or a length that is no whole number from 1.
    """
    asked: Any = {"index_col": False, "skip_blank_lines": False, "compression": None}
    due = f"give a CSV table with a time as {TIME}, whole numbers as {INPUT} and {OUTPUT}"
    kinds = (OSError, ValueError, LookupError, pd.errors.ParserWarning)
    with refusing(f"cannot read the trace {path}", *kinds, remedy=due):
        with warnings.catch_warnings(category=pd.errors.ParserWarning, action="error"):
            rows = pd.read_csv(path, dtype=str, **asked).dropna(how="all")
        if rows.empty:
            raise ValueError("there are no requests below its header")
        times = pd.to_datetime(rows[TIME], format="ISO8601", utc=True, errors="coerce")
        lengths = rows[[INPUT, OUTPUT]].apply(pd.to_numeric, errors="coerce")
        whole = (lengths.ge(1) & lengths.le(LONGEST) & (lengths % 1 == 0)).all(axis=1)
        if wrong := rows.index[times.isna() | ~whole].tolist():
            raise ValueError(f"line {wrong[0] + 2} is no request: {rows.loc[wrong[0]].to_dict()}")
    seconds = (times - times.min()).dt.total_seconds()
    trace = lengths.astype(int).set_axis(["input_tokens", "output_tokens"], axis=1)
    trace.insert(0, "seconds", seconds)
    return trace.sort_values("seconds", kind="stable", ignore_index=True)


def sampled(
    trace: pd.DataFrame, count: int, rate: float, process: Process, seed: int
) -> pd.DataFrame:
    """Sample `count` rows without replacement, kept in order of time, to arrive at `rate` a second.

    The first arrives at 0. With "poisson" the gaps are exponential of mean 1 / rate; with "trace"
    they are the sampled rows' own, stretched alike so that their mean is 1 / rate. Raises UserError
    if the trace has too few rows, or no time passes between the sampled ones.
    """
    if count > len(trace):
        cause = f"the trace has {len(trace)} requests, {count} are asked for"
        raise UserError(f"{cause}; lower workload.requests")
    rows = trace.iloc[sorted(random.Random(seed).sample(range(len(trace)), count))]
    if process == "poisson":
        return rows.assign(seconds=poisson(count, rate, seed))
    times = rows["seconds"] - rows["seconds"].iloc[0]
    span = times.iloc[-1]
    if count > 1 and span == 0:
        raise UserError("the sampled requests all arrive at once; set workload.arrival=poisson")
    return rows.assign(seconds=times * ((count - 1) / rate / span if span else 0.0))


def generated(count: int, rate: float, seed: int) -> pd.DataFrame:
    """Return Poisson arrivals at `rate` a second, with lengths like the conversation trace's."""
    generator = np.random.default_rng(seed)
    lengths = {
        name: np.rint(generator.lognormal(mean, std, count)).clip(1, largest).astype(int)
        for name, (mean, std, largest) in CONVERSATIONS.items()
    }
    return pd.DataFrame({"seconds": poisson(count, rate, seed), **lengths})


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Return `count` arrival times in seconds, the first 0, of a Poisson process."""
    # A stream of its own: the same seed gives the same times whatever the lengths come from.
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]
