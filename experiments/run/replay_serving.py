"""Serve traced requests through a replay runtime, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from experiments.run.serving import Served
from experiments.run.workloads import Request
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.routed import RoutedIteration, joined
from finemoe.trace import TracedRequest, TraceError

Fetch = Callable[[int], TracedRequest]
"""Returns a traced request by its number."""


def fetch_all(batch: Sequence[Request], fetch: Fetch) -> list[TracedRequest]:
    """Return what the trace holds of a batch; TraceError if its answers are too short."""
    traced = [fetch(request.number) for request in batch]
    for request, one in zip(batch, traced, strict=True):
        if len(one.steps) < request.output_tokens:
            raise TraceError(
                f"the trace holds {len(one.steps)} tokens of request {request.number}, not the "
                f"{request.output_tokens} asked for; lower workload.output_tokens"
            )
    return traced


def routed_step(traced: Sequence[TracedRequest], step: int, number: int) -> RoutedIteration:
    """Return iteration `number`, in which every request takes its step `step`."""
    steps = [request.steps[step] for request in traced]
    contexts = [request.steps[0].tokens + step for request in traced]
    return joined(number, [request.number for request in traced], steps, contexts)


@dataclass
class ReplayServer:
    """Runs batches through one runtime; batches and iterations are numbered as `Server` does."""

    runtime: ReplayRuntime
    fetch: Fetch
    batches: int = 0
    iterations: int = 0

    def serve(self, batch: Sequence[Request]) -> list[Served]:
        """Serve requests together; they arrive when their prefill starts."""
        traced = fetch_all(batch, self.fetch)
        first, start = self.iterations, self.runtime.now
        times = []
        for step in range(batch[0].output_tokens):
            end = self.runtime.forward(routed_step(traced, step, self.iterations))
            self.iterations += 1
            times.append(end - start)
        for request in batch:
            self.runtime.end_request(request.number)
        self.batches += 1
        numbers = range(first, self.iterations)
        return [
            Served(
                replace(request, prompt=one.prompt),
                self.batches - 1,
                one.output[: len(times)],
                tuple(times),
                numbers,
            )
            for request, one in zip(batch, traced, strict=True)
        ]
