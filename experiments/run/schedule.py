"""A run is a schedule, what each iteration is, times a backend, which carries it out (seconds)."""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from finemoe.offload.policy import Iteration, Phase


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to generate for it, end-of-text or not."""

    number: int
    prompt: tuple[int, ...]  # token ids; empty where a routing trace is to give them
    output_tokens: int
    arrival: float | None = None  # since serving began; None: when its prefill begins
    input_tokens: int | None = None  # of a prompt that a trace gives; None: as it is


@dataclass(frozen=True)
class Step:
    """One iteration: its requests in the order in which they started."""

    number: int
    phase: Phase
    requests: tuple[Request, ...]
    generated: tuple[int, ...]  # tokens of each request when the step begins; 0 in its prefill

    @property
    def iteration(self) -> Iteration:
        """What the engine calls this step; its requests must have their prompts."""
        prefill = self.phase == "prefill"
        tokens = tuple(len(one.prompt) if prefill else 1 for one in self.requests)
        return Iteration(self.number, self.phase, tuple(r.number for r in self.requests), tokens)

    @property
    def leaving(self) -> tuple[Request, ...]:
        """Requests whose last token this step makes."""
        pairs = zip(self.requests, self.generated, strict=True)
        return tuple(request for request, made in pairs if made + 1 == request.output_tokens)


class Schedule(ABC):
    """Says what each iteration is. It has no clock: it is told the time since serving began."""

    def __init__(self, requests: Sequence[Request], size: int) -> None:
        self._coming, self._size = deque(requests), size
        self._waiting: deque[Request] = deque()
        # Each running request and its tokens so far, by number.
        self._running: dict[int, tuple[Request, int]] = {}

    @property
    def finished(self) -> bool:
        return not (self._coming or self._waiting or self._running)

    @property
    def idle_until(self) -> float:
        return self._coming[0].arrival or 0.0

    def next(self, now: float, number: int) -> Step | None:
        """Return the step to carry out now, then to be told `done`; None to wait for a request."""
        admitted = self._admit(now)
        if admitted:
            self._running |= {request.number: (request, 0) for request in admitted}
            return Step(number, "prefill", admitted, (0,) * len(admitted))
        if not self._running:
            return None
        requests, generated = zip(*self._running.values(), strict=True)
        return Step(number, "decode", requests, generated)

    def done(self, step: Step) -> None:
        """Note that a step was carried out: each of its requests has one more token."""
        for request, made in zip(step.requests, step.generated, strict=True):
            self._running[request.number] = request, made + 1
        for request in step.leaving:
            del self._running[request.number]

    @abstractmethod
    def _admit(self, now: float) -> tuple[Request, ...]:
        """Return the requests whose prefill is to be the next iteration, none for a decode."""


class FixedBatches(Schedule):
    """Batches of at most `size` requests of equal lengths, one batch after the other."""

    def _admit(self, now: float) -> tuple[Request, ...]:
        count = 0 if self._running else min(self._size, len(self._coming))
        return tuple(self._coming.popleft() for _ in range(count))


class ContinuousBatches(Schedule):
    """Requests queue first come, first served, and join and leave between iterations.

    If a request waits and fewer than `size` run, the next iteration is the prefill of the first
    that waits, alone; otherwise it is one decode of all that run.
    """

    def __init__(self, requests: Sequence[Request], size: int) -> None:
        super().__init__(sorted(requests, key=lambda request: request.arrival or 0.0), size)

    def _admit(self, now: float) -> tuple[Request, ...]:
        while self._coming and self.idle_until <= now:
            self._waiting.append(self._coming.popleft())
        if not self._waiting or len(self._running) == self._size:
            return ()
        return (self._waiting.popleft(),)


class Backend(Protocol):
    """Carries iterations out, and knows the time."""

    @property
    def now(self) -> float:
        """The time in seconds, from a beginning of the backend's own."""

    def forward(self, step: Step) -> None:
        """Run one iteration."""

    def wait(self, until: float) -> None:
        """Let time pass until `until`."""

    def end_request(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Forget a request that is served; return its prompt and its answer."""

    def drain(self) -> None:
        """Wait until the policy has seen all that was served."""


@dataclass
class Served:
    """What one request got; times are seconds since it arrived."""

    request: Request
    batch: int  # of its prefill; under continuous batching its place in the order of starts
    arrived: float  # in the backend's time
    queueing: float  # from its arrival to the beginning of its prefill
    tokens: tuple[int, ...] = ()
    token_times: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)  # its prefill, then its decodes

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.token_times[0]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        after = len(self.token_times) - 1
        return (self.e2el - self.ttft) / after if after else None

    @property
    def e2el(self) -> float:
        """End-to-end latency."""
        return self.token_times[-1]

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in itertools.pairwise(self.token_times)]


@dataclass
class Server:
    """Serves schedules through one backend; batches and iterations are numbered across them."""

    backend: Backend
    batches: int = 0
    iterations: int = 0
    busy_seconds: float = 0.0  # time during which a request was under way
    listeners: list[Callable[[Step], None]] = field(default_factory=list)  # called after each step

    def serve(self, schedule: Schedule) -> Iterator[Served]:
        """Run a schedule to its end, and yield the requests as they leave."""
        backend = self.backend
        origin = now = backend.now
        under_way: dict[int, Served] = {}
        while not schedule.finished:
            if not under_way:
                busy_from = now
            step = schedule.next(now - origin, self.iterations)
            if step is None:
                backend.wait(origin + schedule.idle_until)
                now = backend.now
                continue
            if step.phase == "prefill":
                for request in step.requests:
                    arrived = now if request.arrival is None else origin + request.arrival
                    begun = Served(request, self.batches, arrived, now - arrived)
                    under_way[request.number] = begun
                self.batches += 1
            backend.forward(step)
            end = backend.now
            for request in step.requests:
                one = under_way[request.number]
                one.token_times.append(end - one.arrived)
                one.iterations.append(step.number)
            for listener in self.listeners:
                listener(step)
            leaving = [under_way.pop(request.number) for request in step.leaving]
            for one in leaving:
                prompt, one.tokens = backend.end_request(one.request)
                one.request = replace(one.request, prompt=prompt)
            schedule.done(step)
            self.iterations += 1
            if not under_way:
                self.busy_seconds += backend.now - busy_from
            yield from leaving
            now = backend.now
