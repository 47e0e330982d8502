"""Measure what the engine costs: python -m experiments.bench.

Every target is a ratio of two times taken in this one run, so it means the same on a busy machine;
nothing fails because of a time.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from baselines.on_demand import OnDemandPolicy
from experiments.bench.overheads import (
    PREFETCH_DISTANCE,
    SCALE_MODEL,
    Check,
    Load,
    parsed,
    print_checks,
    request,
    resident_overheads,
    scale_model,
    write_json,
)
from experiments.errors import command
from experiments.run.records import provenance
from experiments.run.serving import Server
from experiments.run.testbeds import emulated
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload.device import EmulatedLink
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome
from finemoe.policy import FineMoEOptions, FineMoEPolicy
from finemoe.testbed import Testbed

FULL_EXPERT_BYTES = 352_321_536
"""One expert of Mixtral-8x7B in bf16."""
LINK_GB_S = 32.0
CHUNK_MB = 32.0
BUDGET_SHARE = 0.25
CPU = torch.device("cpu")


def link_rate(plain: PreTrainedModel, testbed: Testbed, load: Load) -> Check:
    """Return the emulated link's rate while copying over the configured one, budget one layer."""
    model = OffloadedModel.from_model(plain, CPU)
    slots = (model.shape.experts,)
    policy = OnDemandPolicy(model.shape)
    runtime = offloading_runtime(model, policy, testbed, slots, FULL_EXPERT_BYTES)
    with runtime:
        Server(runtime).serve([request(0, load, model.model.config.vocab_size)])
    links = [link for link in runtime.links if isinstance(link, EmulatedLink)]
    achieved = sum(link.copied_bytes for link in links) / sum(
        link.copying_seconds for link in links
    )
    configured = model.store.layout.nbytes / testbed.load_seconds(FULL_EXPERT_BYTES)
    return Check("emulated link, achieved / configured rate", achieved / configured, at_least=0.95)


class IterationShares:
    """Splits each iteration into FineMoE's synchronous work and the rest; a runtime listener."""

    def __init__(self, runtime: LiveRuntime) -> None:
        self._runtime = runtime
        self._starts: list[tuple[float, float]] = []

    def __call__(self, outcome: LayerOutcome) -> None:
        if outcome.layer == 0:
            self._starts.append((time.perf_counter(), self._runtime.phases.context_collection))

    def decodes(self) -> list[tuple[float, float]]:
        """Return (iteration, synchronous work) in seconds, from first gate to first gate."""
        spans = zip(self._starts[1:], self._starts[2:], strict=False)
        return [(end - begin, after - before) for (begin, before), (end, after) in spans]


def synchronous_share(plain: PreTrainedModel, testbed: Testbed, load: Load) -> list[Check]:
    """Return FineMoE's synchronous work over the decode iteration at the paper's ratio."""
    model = OffloadedModel.from_model(plain, CPU)
    vocabulary = model.model.config.vocab_size
    policy = FineMoEPolicy(model.shape, FineMoEOptions(PREFETCH_DISTANCE))
    with resident_runtime(model, policy) as runtime:
        server = Server(runtime)
        for number in range(2):
            server.serve([request(number, load, vocabulary)])
        runtime.drain()
    policy.begin_serving()
    slots = (round(BUDGET_SHARE * model.shape.layers * model.shape.experts),)
    runtime = offloading_runtime(model, policy, testbed, slots, FULL_EXPERT_BYTES)
    shares = IterationShares(runtime)
    runtime.listeners.append(shares)
    with runtime:
        Server(runtime).serve([request(2, load, vocabulary)])
    decodes = shares.decodes()
    share = statistics.median(work / iteration for iteration, work in decodes)
    iteration, work = (statistics.median(column) * 1e3 for column in zip(*decodes, strict=True))
    return [
        Check("FineMoE synchronous work / decode iteration", share, at_most=0.01),
        Check("decode iteration, 25 % of the experts", iteration, "ms"),
        Check("of which synchronous work", work, "ms"),
    ]


def measure(folder: Path, resident: Load, offloaded: Load, time_scale: float) -> list[Check]:
    """Run every measurement on the model of a folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    testbed = emulated(1, LINK_GB_S, 0, time_scale, CHUNK_MB, threads=None)
    return [
        *resident_overheads(lambda: scale_model(folder), device, resident),
        link_rate(scale_model(folder), testbed, offloaded),
        *synchronous_share(scale_model(folder), testbed, offloaded),
    ]


@command()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    options = parsed(
        "bench",
        __doc__,
        arguments,
        model=(SCALE_MODEL, "folder of the model"),
        output=(Path("outputs/bench.json"), "where the record goes"),
        rounds=(Load.rounds, "repeats of each system"),
        tokens=(Load.new_tokens, "generated per prompt"),
        time_scale=(1.0, "factor on the link's time"),
        threads=(1, "torch's; searcher and link need cores as well"),
    )
    torch.set_num_threads(options.threads)
    resident = Load(new_tokens=options.tokens, rounds=options.rounds)
    offloaded = Load(new_tokens=min(options.tokens, 12), rounds=1)
    checks = measure(options.model, resident, offloaded, options.time_scale)
    print_checks(f"Overheads ({options.threads} torch threads)", checks, Console())
    record = {
        "model": os.path.relpath(options.model),
        "torch_threads": options.threads,
        "time_scale": options.time_scale,
        "checks": [check.plain() for check in checks],
        **provenance(),
    }
    write_json(options.output, record)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
