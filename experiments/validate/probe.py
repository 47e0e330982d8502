"""Times taken from a live run, and the parts of a forward pass that they fall into."""

import itertools
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from experiments.errors import UserError
from finemoe.offload.policy import Iteration, LayerOutcome
from finemoe.trace import TracedRequest

WAITS = ("on_demand_wait", "prefetch_wait")
# What the model's thread does besides the parts that are looked for: there, a part begins.
STOPS = ("device", *WAITS, "context_collection", "search", "prefetch_issue", "update")
SHORTEST_WAIT = 20e-6  # seconds; what is shorter found its condition met and put no thread to sleep
MOST_MEDIANS = 3


class Span(NamedTuple):
    """A stretch of time on a track, in seconds; `own` if the model's thread spent it."""

    track: str
    start: float
    end: float
    name: str = ""
    own: bool = True


class Sample(NamedTuple):
    """Seconds that a part took for so many tokens, of requests with so long a context."""

    tokens: int
    context: int
    seconds: float
    waited: bool = False  # whether the thread had waited since the part last ran
    copying: bool = False  # whether the link copied most of the time


@dataclass
class Probe:
    """Takes times from a live runtime: as its timeline, and as a listener of server and runtime."""

    begins: list[tuple[Iteration, float]] = field(default_factory=list)
    gates: list[tuple[LayerOutcome, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    lags: int = 0
    lag_seconds: float = 0.0  # of the emulated links; see there
    thread: int = field(default_factory=threading.get_ident)  # the model's thread

    def span(self, track: str, name: str, start: float, end: float) -> None:
        own = threading.get_ident() == self.thread
        self.spans.append(Span(track, start, end, name, own))

    def begin(self, iteration: Iteration) -> None:
        self.begins.append((iteration, time.perf_counter()))

    def gate(self, outcome: LayerOutcome) -> None:
        self.gates.append((outcome, time.perf_counter()))

    def on(self, track: str | tuple[str, ...]) -> list[Span]:
        named = (span for span in self.spans if span.track.startswith(track))
        return sorted(named, key=lambda span: span.start)

    def waits(self) -> list[Span]:
        return [span for span in self.on(WAITS) if span.end - span.start > SHORTEST_WAIT]

    def seconds(self, track: str) -> list[float]:
        return [span.end - span.start for span in self.on(track)]

    def __add__(self, later: Self) -> Self:
        added = ("begins", "gates", "spans", "lags", "lag_seconds")
        return type(self)(*(getattr(self, name) + getattr(later, name) for name in added))


def compute_samples(
    probe: Probe, traced: Mapping[int, TracedRequest], layers: int
) -> dict[str, list[Sample]]:
    """Split iterations into start, dense, finish and expert, waits and calls left out."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    # When the model's thread last did something else: there, a part begins.
    own = [span.end for span in probe.spans if span.own and span.track.startswith(STOPS)]
    stops = sorted(own + [at for _, at in (*probe.gates, *probe.begins)])
    copies = np.array([(span.start, span.end) for span in probe.on("link")]).reshape(-1, 2).T
    woken = [span.end for span in probe.waits()]
    waits_before: dict[str, int] = {}

    def take(part: str, tokens: int, context: int, began: float, ended: float) -> None:
        waits = bisect_right(woken, began)
        waited = waits > waits_before.get(part, waits)
        waits_before[part] = waits
        copied = np.minimum(copies[1], ended) - np.maximum(copies[0], began)
        copying = bool(np.clip(copied, 0, None).sum() > (ended - began) / 2)
        samples[part].append(Sample(tokens, context, ended - began, waited, copying))

    experts, gates = iter(probe.on("device")), iter(probe.gates)
    for tokens, context, counts, next_began in _iterations(probe, traced):
        for outcome, asked in itertools.islice(gates, layers):
            take("dense", tokens, context, stops[bisect_left(stops, asked) - 1], asked)
            for _ in outcome.activated:
                span = next(experts)
                # The runtime named it "expert LAYER.INDEX".
                computed = int(counts[outcome.layer, int(span.name.rpartition(".")[2])])
                began = stops[bisect_right(stops, span.start) - 1]
                take("expert", computed, 0, began, span.end)
        # The first dense part begins with what comes before any layer.
        first = samples["dense"].pop(-layers)
        others = [sample.seconds for sample in samples["dense"][1 - layers :]]
        samples["start"].append(Sample(tokens, context, first.seconds - float(np.mean(others))))
        if next_began is not None:
            ended = stops[bisect_left(stops, next_began) - 1]
            samples["finish"].append(Sample(tokens, context, next_began - ended))
    return dict(samples)


def _iterations(
    probe: Probe, traced: Mapping[int, TracedRequest]
) -> Iterator[tuple[int, int, NDArray[Any], float | None]]:
    """Yield tokens, context, tokens of each expert, and when a decode step followed, if one did."""
    steps: Counter[int] = Counter()
    for (iteration, _), (following, next_began) in itertools.pairwise(probe.begins):
        routed = [traced[number].steps[steps[number]] for number in iteration.requests]
        contexts = [traced[number].steps[0].tokens + steps[number] for number in iteration.requests]
        steps.update(iteration.requests)
        counts = np.sum([step.counts for step in routed], axis=0)
        followed = next_began if following.phase == "decode" else None
        yield sum(iteration.tokens), sum(contexts), counts, followed


def wake_and_resume(probe: Probe, load_seconds: float) -> tuple[float, float]:
    """Return the seconds that an idle link takes to begin, and a waiting model to go on.

    The former from gates that find nothing, of a system that prefetches nothing, to the first
    chunk; the latter from when each load is due, all following that chunk, to the wait's end.
    Raises UserError if no layer missed all its experts.
    """
    copies, waits = probe.on("link"), probe.waits()
    begins, woken = [span.start for span in copies], [span.end for span in waits]
    wakes, resumes = [], []
    ends = [at for _, at in probe.gates[1:]] + [float("inf")]
    for (outcome, asked), end in zip(probe.gates, ends, strict=True):
        missed = len(outcome.misses)
        mine = woken[bisect_right(woken, asked) : bisect_right(woken, end)]
        if missed < len(outcome.activated) or not mine:
            continue
        began = begins[bisect_left(begins, asked)]
        wakes.append(began - asked)
        # Fewer waits than loads: some arrived together, and which did is known of the first alone.
        known = mine if len(mine) == missed else mine[:1]
        resumes += [at - began - load_seconds * loads for loads, at in enumerate(known, 1)]
    if not wakes:
        raise UserError("no layer missed all its experts; lower memory_budgets")
    wake, resume = (float(np.mean(without_outliers(one))) for one in (wakes, resumes))
    return max(0.0, wake), max(0.0, resume)


def without_outliers(seconds: Iterable[float]) -> list[float]:
    """Return what is not beyond MOST_MEDIANS medians: there, another process had the core."""
    values = list(seconds)
    median = float(np.median(values))
    # A difference of two times can be negative.
    most = max(median, MOST_MEDIANS * median)
    return [one for one in values if one <= most]


def call_seconds(probe: Probe, layers: int) -> dict[str, float]:
    """Return what the policy's calls take, in seconds; one on_embeddings, then L on_gates.

    Each with the queueing of the prefetches that it led to, if it led to any.
    """
    searches = probe.on("search")
    if not searches:
        return {}
    seconds = np.array([span.end - span.start for span in searches])
    begins = [span.start for span in searches]
    for issue in probe.on("prefetch_issue"):
        seconds[bisect_right(begins, issue.start) - 1] += issue.end - issue.start
    of_gates = np.arange(len(seconds)) % (layers + 1) > 0
    return {
        "embeddings": float(np.mean(without_outliers(seconds[~of_gates]))),
        "gate": float(np.mean(without_outliers(seconds[of_gates]))),
        "update": sum(probe.seconds("update")) / len(probe.begins),
    }
