"""Record what a model routes while it serves requests, as a routing trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.console import Console
from experiments.datasets import PromptSet
from experiments.models import LoadedModel
from experiments.records import provenance
from experiments.serving import Server, in_batches
from experiments.setup import Setup, plain_runtime
from experiments.workloads import Request
from finemoe.offload.live import LiveRuntime
from finemoe.recorder import EVERYTHING, Recorder, gate_weights
from finemoe.trace import TraceHeader
from finemoe.trace_file import TraceWriter


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
        with (
            ExitStack() as stack,
            Recorder(self.runtime.model) as recorder,
            console.progress("recording", total) as advance,
        ):
            server = Server(self.runtime, listeners=[recorder.begin])
            writer: TraceWriter | None = None
            for batch in batches:
                served = server.serve(batch)
                if writer is None:
                    # Gates may compute in a wider dtype than the model's.
                    header = replace(self.header, dtype=recorder.dtype)
                    writer = stack.enter_context(TraceWriter(path, header))
                for one in served:
                    request = one.request
                    writer.write(recorder.finish(request.number, request.prompt, one.tokens))
                advance(len(batch))


def trace_header(model: LoadedModel, prompts: PromptSet, seed: int) -> TraceHeader:
    """Return the header of a trace of these prompts."""
    origin = {
        "model": model.name,
        "weights": model.weights,
        "dataset": prompts.dataset,
        "dataset_source": prompts.source,
        "dataset_sha256": prompts.sha256,
        "seed": seed,
        "dense_bytes": model.offloaded.dense_bytes,
        **provenance(),
    }
    gates = gate_weights(model.offloaded)
    return TraceHeader(model.offloaded.shape, "bfloat16", EVERYTHING, origin, gates)
