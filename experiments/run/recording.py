"""Record what a model routes while it serves requests, as a routing trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.run.console import Console
from experiments.run.continuous import ContinuousServer, Schedule, Step, run_schedule
from experiments.run.datasets import PromptSet
from experiments.run.models import LoadedModel
from experiments.run.online import TimedRequest
from experiments.run.records import provenance
from experiments.run.serving import Server, in_batches
from experiments.run.setup import Setup, plain_runtime
from experiments.run.workloads import Request
from finemoe.offload.live import LiveRuntime
from finemoe.recorder import Recorder, gate_weights
from finemoe.trace import CONTENTS, TracedRequest, TraceHeader, trace_writer

Write = Callable[[Request, tuple[int, ...]], None]
"""Takes a request that is served and its tokens."""


def record_setup(setup: Setup, path: Path, console: Console) -> None:
    """Record the history and the measured requests of a live run, in the batches it serves."""
    load, settings = setup.workload, setup.settings
    batches = itertools.chain(
        in_batches(load.history, settings.history_batch_size),
        in_batches(load.measured, settings.batch_size),
    )
    total = len(load.history) + len(load.measured)
    with plain_runtime(setup) as runtime:
        recording = Recording(runtime, trace_header(setup.model, setup.prompts, setup.cfg.seed))
        recording.run(batches, total, path, console)


@dataclass(frozen=True)
class Recording:
    """A runtime whose routing is recorded under a header; use within the runtime's block."""

    runtime: LiveRuntime
    header: TraceHeader

    def run(
        self, batches: Iterable[Sequence[Request]], total: int, path: Path, console: Console
    ) -> None:
        """Serve batches and write what each request routed; the file appears when complete."""
        with self._writing(total, path, console) as (recorder, write):
            server = Server(self.runtime, listeners=[recorder.begin])
            for batch in batches:
                for one in server.serve(batch):
                    write(one.request, one.tokens)

    def run_continuously(
        self, requests: Sequence[TimedRequest], max_batch_size: int, path: Path, console: Console
    ) -> None:
        """Serve requests as if all came at once, in batches as full as can be; write as `run`.

        The longest prompts go first, so that a batch pads little.
        """
        with self._writing(len(requests), path, console) as (recorder, write):
            server = ContinuousServer(self.runtime, max_batch_size)

            def carry_out(step: Step, now: float) -> float:
                recorder.begin(step.iteration)
                server.carry_out(step)
                for request in step.leaving:
                    write(request, server.collect(request.number))
                return now

            longest_first = sorted(requests, key=lambda request: -len(request.prompt))
            waiting = [replace(request, arrival=0.0) for request in longest_first]
            run_schedule(Schedule(waiting, max_batch_size), carry_out)

    @contextmanager
    def _writing(
        self, total: int, path: Path, console: Console
    ) -> Iterator[tuple[Recorder, Write]]:
        with (
            ExitStack() as stack,
            Recorder(self.runtime.model) as recorder,
            console.progress("recording", total) as advance,
        ):
            writers: list[Callable[[TracedRequest], None]] = []

            def write(request: Request, tokens: tuple[int, ...]) -> None:
                if not writers:
                    # Gates may compute in a wider dtype than the model's.
                    header = replace(self.header, dtype=recorder.dtype)
                    writers.append(stack.enter_context(trace_writer(path, header)))
                writers[0](recorder.finish(request.number, request.prompt, tokens))
                advance(1)

            yield recorder, write


def trace_header(
    model: LoadedModel, prompts: PromptSet, seed: int, passes: int | None = 1
) -> TraceHeader:
    """Return the header of a trace of these prompts, for which texts were gone through so often."""
    origin = {
        "model": model.name,
        "weights": model.weights,
        "dataset": prompts.dataset,
        "dataset_source": prompts.source,
        "dataset_sha256": prompts.sha256,
        "seed": seed,
        "dense_bytes": model.offloaded.dense_bytes,
        "passes": passes,
        "positions": model.positions,
        **provenance(),
    }
    gates = gate_weights(model.offloaded)
    return TraceHeader(model.offloaded.shape, "bfloat16", CONTENTS, origin, gates)
