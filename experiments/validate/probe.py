"""Times taken from a live run, and the parts of a forward pass that they fall into."""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from experiments.errors import UserError
from finemoe.offload.policy import Iteration, LayerOutcome
from finemoe.trace import TracedRequest

WAITS = ("on_demand_wait", "prefetch_wait")
STOPS = ("device", *WAITS, "context_collection", "search", "prefetch_issue", "update")
"""What the model's thread does besides the parts that are looked for; a part begins where one of
these ended."""
SHORTEST_WAIT = 20e-6
"""Seconds; what is shorter found its condition met and put no thread to sleep."""
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
    waited: bool = False
    """Whether the thread had waited since the part last ran."""
    copying: bool = False
    """Whether the link copied most of the time."""


@dataclass
class Probe:
    """Takes times from a live runtime: as its timeline, and as a listener of server and runtime."""

    begins: list[tuple[Iteration, float]] = field(default_factory=list)
    gates: list[tuple[LayerOutcome, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    lags: int = 0
    lag_seconds: float = 0.0
    """Of the emulated links; see there."""
    thread: int = field(default_factory=threading.get_ident)
    """The model's thread."""

    def span(self, track: str, name: str, start: float, end: float) -> None:
        own = threading.get_ident() == self.thread
        self.spans.append(Span(track, start, end, name, own))

    def begin(self, iteration: Iteration) -> None:
        self.begins.append((iteration, time.perf_counter()))

    def gate(self, outcome: LayerOutcome) -> None:
        self.gates.append((outcome, time.perf_counter()))

    def on(self, track: str) -> list[Span]:
        """Return the spans of the tracks whose names begin so, in order of their starts."""
        named = (span for span in self.spans if span.track.startswith(track))
        return sorted(named, key=lambda span: span.start)

    def waits(self) -> list[Span]:
        """Return when the model's thread slept, in order."""
        waits = (span for track in WAITS for span in self.on(track))
        return sorted((s for s in waits if s.end - s.start > SHORTEST_WAIT), key=lambda s: s.start)

    def seconds(self, track: str) -> list[float]:
        return [span.end - span.start for span in self.on(track)]

    def __add__(self, later: Probe) -> Probe:
        added = ("begins", "gates", "spans", "lags", "lag_seconds")
        return Probe(*(getattr(self, name) + getattr(later, name) for name in added))


class _Parts:
    """Measures parts: each begins where the model's thread last did something else."""

    def __init__(self, probe: Probe) -> None:
        own = [s for s in probe.spans if s.own and s.track.startswith(STOPS)]
        self._stops = sorted(
            [s.end for s in own] + [at for _, at in probe.gates] + [at for _, at in probe.begins]
        )
        copies = probe.on("link")
        self._copies = np.array([(span.start, span.end) for span in copies]).reshape(-1, 2).T
        self._woken = [span.end for span in probe.waits()]
        self._waits_before: dict[str, int] = {}

    def measure(self, part: str, tokens: int, context: int, started: float, end: float) -> Sample:
        """Return the sample of a part that was under way at `started` and ended at `end`."""
        began = self._stops[bisect_right(self._stops, started) - 1]
        waits = bisect_right(self._woken, began)
        waited = waits > self._waits_before.get(part, waits)
        self._waits_before[part] = waits
        copying = self._copied(began, end) > (end - began) / 2
        return Sample(tokens, context, end - began, waited, copying)

    def before(self, at: float) -> float:
        """Return the latest stop before `at`."""
        return self._stops[bisect_left(self._stops, at) - 1]

    def _copied(self, began: float, end: float) -> float:
        starts, ends = self._copies
        return float(np.clip(np.minimum(ends, end) - np.maximum(starts, began), 0, None).sum())


def compute_samples(
    probe: Probe, traced: Mapping[int, TracedRequest], layers: int
) -> dict[str, list[Sample]]:
    """Split iterations into start, dense, finish and expert, waits and the policy's calls left out.

    What passes between two experts counts for the second; the last iteration of all is left out.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    parts = _Parts(probe)
    experts = iter(probe.on("device"))
    steps: dict[int, int] = defaultdict(int)
    gates = iter(probe.gates)
    for (iteration, _), (following, next_began) in itertools.pairwise(probe.begins):
        routed = [traced[number].steps[steps[number]] for number in iteration.requests]
        contexts = [traced[number].steps[0].tokens + steps[number] for number in iteration.requests]
        for number in iteration.requests:
            steps[number] += 1
        tokens, context = sum(iteration.tokens), sum(contexts)
        counts = np.sum([step.counts for step in routed], axis=0)
        dense = []
        for outcome, asked in itertools.islice(gates, layers):
            dense.append(parts.measure("dense", tokens, context, parts.before(asked), asked))
            for _ in outcome.activated:
                span = next(experts)
                computed = int(counts[outcome.layer, _index(span)])
                samples["expert"].append(parts.measure("expert", computed, 0, span.start, span.end))
        first, *others = dense
        samples["dense"] += others
        seconds = first.seconds - float(np.mean([sample.seconds for sample in others]))
        samples["start"].append(Sample(tokens, context, seconds))
        if following.phase == "decode":
            ended = parts.before(next_began)
            samples["finish"].append(Sample(tokens, context, next_began - ended))
    return dict(samples)


def _index(span: Span) -> int:
    """Return the expert of a span that the runtime named "expert LAYER.INDEX"."""
    return int(span.name.rpartition(".")[2])


def waking(probe: Probe, load_seconds: float) -> tuple[float, float]:
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
        told = mine if len(mine) == missed else mine[:1]
        resumes += [at - began - load_seconds * (place + 1) for place, at in enumerate(told)]
    if not wakes:
        raise UserError("no layer missed all its experts; lower memory_budgets")
    wake, resume = float(np.mean(undisturbed(wakes))), float(np.mean(undisturbed(resumes)))
    return max(0.0, wake), max(0.0, resume)


def undisturbed(seconds: Sequence[float]) -> list[float]:
    """Return what is not beyond MOST_MEDIANS medians: there, another process had the core."""
    median = float(np.median(seconds))
    # A difference of two times can be negative.
    most = max(median, MOST_MEDIANS * median)
    return [one for one in seconds if one <= most]


def collecting(probe: Probe) -> float:
    """Return what handing over one context takes of the critical path, in seconds."""
    contexts = len(probe.begins) + len(probe.gates)
    return sum(probe.seconds("context_collection")) / contexts


def predicting(probe: Probe, layers: int) -> dict[str, float]:
    """Return what the policy's calls take, in seconds; one on_embeddings, then L on_gates.

    Each with the queueing of the prefetches that it led to, if it led to any.
    """
    searches = probe.on("search")
    if not searches:
        return {}
    search = [span.end - span.start for span in searches]
    begins = [span.start for span in searches]
    for issue in probe.on("prefetch_issue"):
        search[bisect_right(begins, issue.start) - 1] += issue.end - issue.start
    width = layers + 1
    gates = [seconds for place, seconds in enumerate(search) if place % width]
    return {
        "embeddings": float(np.mean(undisturbed(search[::width]))),
        "gate": float(np.mean(undisturbed(gates))),
        "update": sum(probe.seconds("update")) / len(probe.begins),
    }
