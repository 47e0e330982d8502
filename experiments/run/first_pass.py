"""The pass with every expert resident: what offloaded serving must reproduce, and what it routes.

It gives the logits that a run is compared with, the routing that bounds know in advance, and the
time of compute alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from experiments.run.console import Console
from experiments.run.serving import in_batches
from experiments.run.setup import Setup, everything_fits, plain_runtime
from finemoe.offload.policy import LayerOutcome


@dataclass
class FirstPass:
    """What the first pass over warm-up and measured requests left behind."""

    logits: list[list[Tensor]] | None
    """Logits (B, vocabulary) of every step of every measured batch; None if not to be verified."""
    routing: list[list[tuple[int, ...]]] = field(default_factory=list)
    measured_from: int = 0
    """Number of the first measured iteration."""
    compute_s: float | None = None
    """Seconds to serve the measured requests; None if their experts were not all resident."""

    def __call__(self, outcome: LayerOutcome) -> None:
        """Take note of what a layer activated."""
        if outcome.layer == 0:
            self.routing.append([])
        self.routing[-1].append(outcome.activated)


def first_pass(setup: Setup, console: Console) -> FirstPass | None:
    """Serve warm-up and measured requests once; None if nothing of it is asked for."""
    resident = everything_fits(setup)
    verify = bool(setup.cfg.verify) and resident
    if not (verify or setup.policy.set_future_routing):
        return None
    load, size = setup.workload, setup.settings.batch_size
    done = FirstPass([] if verify else None)
    with (
        plain_runtime(setup) as runtime,
        console.progress("reference", len(load.measured)) as advance,
    ):
        runtime.listeners.append(done)
        server = setup.server(runtime)
        for batch in in_batches(load.warmup, size):
            server.serve(batch)
        done.measured_from = server.iterations
        began = time.perf_counter()
        for batch in in_batches(load.measured, size):
            server.serve(batch)
            if done.logits is not None:
                done.logits.append([logits.cpu() for logits in server.logits])
            advance(len(batch))
        done.compute_s = time.perf_counter() - began if resident else None
    return done
