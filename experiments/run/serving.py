"""Serve batches of requests through a live runtime, and take the times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.run.workloads import Request
from finemoe.offload.policy import Iteration, Phase


@dataclass(frozen=True)
class Served:
    """What one request got, with times in seconds since it arrived."""

    request: Request
    batch: int
    tokens: tuple[int, ...]
    token_times: tuple[float, ...]
    iterations: Sequence[int]
    """Numbers of the iterations that served it: its prefill, then its decodes."""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.token_times[0]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        if len(self.token_times) == 1:
            return None
        return (self.e2el - self.ttft) / (len(self.token_times) - 1)

    @property
    def e2el(self) -> float:
        """End-to-end latency."""
        return self.token_times[-1]

    @property
    def itl(self) -> tuple[float, ...]:
        """Inter-token latencies."""
        return tuple(b - a for a, b in itertools.pairwise(self.token_times))


class Placed(Protocol):
    """A model on a device."""

    @property
    def device(self) -> torch.device: ...


class Runtime(Protocol):
    """What a server needs of what runs its forward passes."""

    @property
    def model(self) -> Placed: ...

    def forward(self, iteration: Iteration, **inputs: Any) -> Any: ...

    def end_request(self, request: int) -> None: ...


@dataclass(frozen=True)
class PlainRuntime:
    """Runs a model as it is: no policy, no budget."""

    model: Any

    def forward(self, iteration: Iteration, **inputs: Any) -> Any:
        """Run one forward pass."""
        return self.model(**inputs)

    def end_request(self, request: int) -> None:
        """Nothing was kept for a request."""


def greedy(logits: Tensor) -> Tensor:
    """Return the likeliest tokens, (B, 1), of logits (B, vocabulary)."""
    return logits.argmax(-1, keepdim=True)


@dataclass
class Server:
    """Runs requests in batches through one runtime; iterations are numbered across batches."""

    runtime: Runtime
    batches: int = 0
    logits: list[Tensor] = field(default_factory=list)
    """The last batch's logits of every step, each (B, vocabulary), on the model's device."""
    iterations: int = 0
    listeners: list[Callable[[Iteration], None]] = field(default_factory=list)
    """Called before every forward pass."""
    choose: Callable[[Tensor], Tensor] = greedy
    """Turns logits (B, vocabulary) into the tokens to go on with, (B, 1)."""

    @torch.inference_mode()
    def serve(self, batch: Sequence[Request]) -> list[Served]:
        """Serve requests of equal lengths together; they arrive when their prefill starts."""
        device = self.runtime.model.device
        tokens = torch.tensor([request.prompt for request in batch], device=device)
        self.logits = []
        generated, times, cache = [], [], None
        first = self.iterations
        start = time.perf_counter()
        for _ in range(batch[0].output_tokens):
            output = self.runtime.forward(
                self._iteration(batch, tokens.shape[1]),
                input_ids=tokens,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.cache
            self.logits.append(output.logits[:, -1])
            tokens = self.choose(self.logits[-1])
            generated.append(tokens[:, 0].tolist())
            times.append(time.perf_counter() - start)
        for request in batch:
            self.runtime.end_request(request.number)
        self.batches += 1
        columns = zip(*generated, strict=True)
        numbers = range(first, self.iterations)
        return [
            Served(request, self.batches - 1, tuple(column), tuple(times), numbers)
            for request, column in zip(batch, columns, strict=True)
        ]

    def _iteration(self, batch: Sequence[Request], tokens: int) -> Iteration:
        numbers = tuple(request.number for request in batch)
        phase: Phase = "decode" if self.logits else "prefill"
        iteration = Iteration(self.iterations, phase, numbers, (tokens,) * len(batch))
        self.iterations += 1
        for listener in self.listeners:
            listener(iteration)
        return iteration


def in_batches(requests: Sequence[Request], size: int) -> Iterator[tuple[Request, ...]]:
    """Yield consecutive batches of at most `size` requests."""
    for start in range(0, len(requests), size):
        yield tuple(requests[start : start + size])
