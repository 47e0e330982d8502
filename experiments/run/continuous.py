"""Continuous batching: who is served in the next iteration, in virtual time and live.

Requests queue first come, first served. At every border between iterations, if a request waits and
fewer than `max_batch_size` run, the next iteration is the prefill of the first that waits, alone;
otherwise it is one decode of all that run. A request leaves at the border after its last token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from experiments.run.online import TimedRequest
from experiments.run.serving import Served
from finemoe.offload.live import LiveRuntime
from finemoe.offload.policy import Iteration, Phase

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig


@dataclass(frozen=True)
class Step:
    """One iteration: its requests in the order in which they started."""

    number: int
    phase: Phase
    requests: tuple[TimedRequest, ...]
    generated: tuple[int, ...]
    """How many tokens each request has when the step begins; 0 in its prefill."""

    @property
    def iteration(self) -> Iteration:
        """What the engine calls this step."""
        decode = (1,) * len(self.requests)
        prefill = tuple(len(request.prompt) for request in self.requests)
        numbers = tuple(request.number for request in self.requests)
        tokens = prefill if self.phase == "prefill" else decode
        return Iteration(self.number, self.phase, numbers, tokens)

    @property
    def leaving(self) -> tuple[TimedRequest, ...]:
        """Requests whose last token this step makes."""
        pairs = zip(self.requests, self.generated, strict=True)
        return tuple(request for request, made in pairs if made + 1 == request.output_tokens)


class Schedule:
    """Decides the steps of one serving run. It has no clock: it is told the time, in seconds."""

    def __init__(
        self, requests: Sequence[TimedRequest], max_batch_size: int, first_iteration: int = 0
    ) -> None:
        """Take all requests to come; of those that come at once, the first one given is first.

        Iterations are numbered from the one given.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size}: it starts at 1")
        if len({request.number for request in requests}) < len(requests):
            raise ValueError("two requests have the same number")
        self._coming = deque(sorted(requests, key=lambda one: one.arrival))
        self._waiting: deque[TimedRequest] = deque()
        self._running: dict[int, tuple[TimedRequest, int]] = {}
        self._max_batch_size = max_batch_size
        self._number = first_iteration
        self._current: Step | None = None

    @property
    def finished(self) -> bool:
        """Whether every request has been served."""
        return not (self._coming or self._waiting or self._running)

    @property
    def idle_until(self) -> float | None:
        """When the next request comes, if there is nothing to do before; else None."""
        if self._waiting or self._running or not self._coming:
            return None
        return self._coming[0].arrival

    def next(self, now: float) -> Step | None:
        """Return the step to carry out now, which `done` must follow; None if there is none."""
        if self._current is not None:
            raise ValueError(f"iteration {self._current.number} is not done yet")
        while self._coming and self._coming[0].arrival <= now:
            self._waiting.append(self._coming.popleft())
        if self._waiting and len(self._running) < self._max_batch_size:
            first = self._waiting.popleft()
            self._running[first.number] = first, 0
            self._current = Step(self._number, "prefill", (first,), (0,))
        elif self._running:
            requests, generated = zip(*self._running.values(), strict=True)
            self._current = Step(self._number, "decode", requests, generated)
        return self._current

    def done(self) -> None:
        """Note that the current step has been carried out: each of its requests got a token."""
        if self._current is None:
            raise ValueError("no step is under way")
        for request, made in zip(self._current.requests, self._current.generated, strict=True):
            self._running[request.number] = request, made + 1
        for request in self._current.leaving:
            del self._running[request.number]
        self._number += 1
        self._current = None


@dataclass(frozen=True)
class ServiceTimes:
    """When a request was served."""

    request: TimedRequest
    started: float
    """When its prefill began, in seconds since serving began."""
    token_times: tuple[float, ...]
    """Seconds from its arrival to each token."""
    iterations: tuple[int, ...]
    """Numbers of the iterations that made its tokens."""

    @property
    def queueing(self) -> float:
        """Seconds from its arrival to the beginning of its prefill."""
        return self.started - self.request.arrival


def run_schedule(
    schedule: Schedule,
    carry_out: Callable[[Step, float], float],
    wait: Callable[[float], float] = lambda until: until,
) -> tuple[ServiceTimes, ...]:
    """Run a schedule to its end; return the times in the order in which requests started.

    `carry_out` gets each step with the time it begins and returns the time it ended. `wait` gets
    the next arrival and returns the time after waiting for it; as it stands, time is virtual.
    Raises ValueError if a step ends before it began.
    """
    started: dict[int, tuple[TimedRequest, float]] = {}
    made: dict[int, list[tuple[float, int]]] = {}
    now = 0.0
    while not schedule.finished:
        step = schedule.next(now)
        if step is None:
            assert schedule.idle_until is not None
            now = wait(schedule.idle_until)
            continue
        end = carry_out(step, now)
        if end < now:
            raise ValueError(f"iteration {step.number} ended before it began")
        for request in step.requests:
            started.setdefault(request.number, (request, now))
            times = made.setdefault(request.number, [])
            times.append((end - request.arrival, step.number))
        schedule.done()
        now = end
    return tuple(
        ServiceTimes(request, begin, *zip(*made[number], strict=True))
        for number, (request, begin) in started.items()
    )


@dataclass(frozen=True)
class ServedOnline(Served):
    """What a request got that arrived at its time; `batch` is its place in the order of starts."""

    request: TimedRequest
    queueing: float
    """Seconds that it waited for its prefill; all times count from its arrival."""


@dataclass(frozen=True)
class Context:
    """Keys and values of one request: the last `tokens` of one row of a cache."""

    cache: DynamicCache
    row: int
    rows: int
    """How many rows the cache has."""
    tokens: int


LogitsListener = Callable[[Step, Tensor], None]
"""Gets each step's logits (B, vocabulary) on the model's device, rows as in `Step.requests`."""


class ContinuousServer:
    """Serves requests greedily through one runtime, in real time, with continuous batching.

    Routers never see padding: a prefill runs alone, and a decode has one row a request, whose
    contexts of different lengths are padded on the left, in the cache only, and masked. (A model
    whose rotary embedding changes with the longest position of a batch, like Phi-3.5-MoE beyond
    4,096 tokens, therefore computes a short context beside a long one as if it were long.)
    """

    def __init__(
        self,
        runtime: LiveRuntime,
        max_batch_size: int,
        first_iteration: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.runtime = runtime
        self.steps: list[Step] = []
        """Every step carried out so far."""
        self.listeners: list[LogitsListener] = []
        self.busy_seconds = 0.0
        """Time during which `serve` carried out steps, and did not wait for arrivals."""
        self._max_batch_size = max_batch_size
        self._next_iteration = first_iteration
        self._clock = clock
        self._sleep = sleep
        self._contexts: dict[int, Context] = {}
        self._tokens: dict[int, list[int]] = {}

    def serve(self, requests: Sequence[TimedRequest]) -> list[ServedOnline]:
        """Serve requests as they arrive, counted from now; return them in order of their start."""
        start = self._clock()

        def carry_out(step: Step, begin: float) -> float:
            self.carry_out(step)
            end = self._clock() - start
            self.busy_seconds += end - begin
            return end

        def wait(until: float) -> float:
            self._sleep(max(0.0, until - (self._clock() - start)))
            return self._clock() - start

        schedule = Schedule(requests, self._max_batch_size, self._next_iteration)
        order = run_schedule(schedule, carry_out, wait)
        return [self._served(place, times) for place, times in enumerate(order)]

    @torch.inference_mode()
    def carry_out(self, step: Step) -> None:
        """Run one iteration; each of its requests gets a token, and those that leave are ended.

        The steps of another server, in their order, can be given to repeat its very batches.
        """
        logits = self._prefill(step) if step.phase == "prefill" else self._decode(step)
        for request, token in zip(step.requests, logits.argmax(-1).tolist(), strict=True):
            self._tokens.setdefault(request.number, []).append(token)
        for listener in self.listeners:
            listener(step, logits)
        for request in step.leaving:
            self.runtime.end_request(request.number)
            del self._contexts[request.number]
        self.steps.append(step)
        self._next_iteration = step.number + 1

    def collect(self, request: int) -> tuple[int, ...]:
        """Hand out a request's tokens and forget them; KeyError if it has none."""
        return tuple(self._tokens.pop(request))

    def _prefill(self, step: Step) -> Tensor:
        (request,) = step.requests
        output = self.runtime.forward(
            step.iteration,
            input_ids=torch.tensor([request.prompt], device=self.runtime.model.device),
            use_cache=True,
            logits_to_keep=1,
        )
        self._contexts[request.number] = Context(output.cache, 0, 1, len(request.prompt))
        return output.logits[:, -1]

    def _decode(self, step: Step) -> Tensor:
        iteration, device = step.iteration, self.runtime.model.device
        numbers = iteration.requests
        contexts = self._together([self._contexts[number] for number in numbers])
        lengths = torch.tensor([[context.tokens] for context in contexts], device=device)
        longest = max(context.tokens for context in contexts)
        padded = any(context.tokens < longest for context in contexts)
        columns = torch.arange(longest + 1, device=device)
        output = self.runtime.forward(
            iteration,
            input_ids=torch.tensor([[self._tokens[n][-1]] for n in numbers], device=device),
            position_ids=lengths,
            attention_mask=(columns >= longest - lengths).long() if padded else None,
            cache=contexts[0].cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for number, context in zip(numbers, contexts, strict=True):
            self._contexts[number] = replace(context, tokens=context.tokens + 1)
        return output.logits[:, -1]

    def _together(self, contexts: list[Context]) -> list[Context]:
        """Return the contexts as the rows of one cache, which is built only if they are not yet."""
        cache = contexts[0].cache
        mine = [context.row for context in contexts if context.cache is cache]
        if len(mine) == len(contexts) and mine == list(range(contexts[0].rows)):
            return contexts
        cache = merged(contexts, self.runtime.model.model.config)
        return [
            Context(cache, row, len(contexts), context.tokens)
            for row, context in enumerate(contexts)
        ]

    def _served(self, place: int, times: ServiceTimes) -> ServedOnline:
        tokens = self.collect(times.request.number)
        return ServedOnline(
            times.request,
            place,
            tokens,
            times.token_times,
            times.iterations,
            times.queueing,
        )


def merged(contexts: Sequence[Context], config: PreTrainedConfig) -> DynamicCache:
    """Return one cache with a row for each context, padded with zeros on the left.

    Raises ValueError if a layer keeps anything else than keys and values of its tokens.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    longest = max(context.tokens for context in contexts)
    for index, layer in enumerate(cache.layers):
        rows = [_own(context, index) for context in contexts]
        width = max(keys.shape[-2] for keys, _ in rows)
        keys, values = (
            torch.cat([pad(row[part], (0, 0, width - row[part].shape[-2], 0)) for row in rows])
            for part in (0, 1)
        )
        assert isinstance(layer, DynamicLayer)
        layer.update(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            # A window keeps fewer tokens than it has seen, and its mask counts those seen.
            layer.cumulative_length = longest
    return cache


def _own(context: Context, index: int) -> tuple[Tensor, Tensor]:
    """Return a context's keys and values in one layer, each (1, heads, tokens kept, width)."""
    from transformers.cache_utils import DynamicLayer

    layer = context.cache.layers[index]
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be batched")
    row = slice(context.row, context.row + 1)
    kept = min(context.tokens, layer.keys.shape[-2])
    return layer.keys[row, :, -kept:], layer.values[row, :, -kept:]
