"""Measure what serving costs on this machine: ``python -m experiments.calibrate output=FILE``.

Serves a few prompts of their own with the live runtime and writes a testbed in which the same
hardware runs in virtual time. Compute is measured with every expert resident; what a system's
predictions cost, and what a wait adds to the pace of its links, under a small budget.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf
from scipy.optimize import nnls

from experiments.console import Console
from experiments.errors import UserError
from experiments.first_pass import first_pass
from experiments.harness import build_history
from experiments.recording import record_setup
from experiments.records import provenance
from experiments.serving import Server, in_batches
from experiments.setup import Setup, build, prepare, under_budget
from finemoe.offload.policy import Iteration, LayerOutcome
from finemoe.testbed import Testbed
from finemoe.trace import TracedRequest
from finemoe.trace_file import TraceReader

NEUTRAL = "on_demand"
"""The system whose runs show compute and links alone: it predicts nothing."""


class Span(NamedTuple):
    """A stretch of time on a track, in seconds."""

    track: str
    start: float
    end: float


class Sample(NamedTuple):
    """Seconds that a part took for so many tokens, of requests with so long a context."""

    tokens: int
    context: int
    seconds: float


@dataclass
class Probe:
    """Takes times from a live runtime: as its timeline, and as a listener of server and runtime."""

    begins: list[tuple[Iteration, float]] = field(default_factory=list)
    gates: list[tuple[LayerOutcome, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def span(self, track: str, name: str, start: float, end: float) -> None:
        self.spans.append(Span(track, start, end))

    def begin(self, iteration: Iteration) -> None:
        self.begins.append((iteration, time.perf_counter()))

    def gate(self, outcome: LayerOutcome) -> None:
        self.gates.append((outcome, time.perf_counter()))

    def on(self, track: str) -> list[Span]:
        return [span for span in self.spans if span.track == track]

    def seconds(self, track: str) -> list[float]:
        return [span.end - span.start for span in self.on(track)]


# Serving under observation ------------------------------------------------------------------------


def as_run(cfg: DictConfig, system: str, **changes: Any) -> DictConfig:
    """Return the config that run.py would have for one system of this command's."""
    plain: Any = {
        "system": cfg.systems[system],
        "model": cfg.model,
        "dataset": cfg.dataset,
        "workload": cfg.workload,
        "testbed": cfg.testbed,
        "weights": cfg.weights,
        "seed": cfg.seed,
        "store": {"load": None, "save": None},
        "verify": False,
        "record": False,
        "timeline": False,
        "routing": None,
        "output": None,
        **changes,
    }
    return OmegaConf.create(plain)


def observed(setup: Setup, console: Console) -> Probe:
    """Serve warm-up and measured requests under the budget; return the times of the latter."""
    build_history(setup, console)
    policy = copy.deepcopy(setup.policy)
    reference = first_pass(setup, console)
    if reference is not None and policy.placement.foresight:
        policy.foretell(reference.routing)
    probe = Probe()
    with under_budget(setup, policy, probe) as runtime:
        server = Server(runtime, listeners=[probe.begin])
        for batch in in_batches(setup.workload.warmup, setup.settings.batch_size):
            server.serve(batch)
        runtime.drain()
        probe.begins.clear()
        probe.spans.clear()
        runtime.listeners.append(probe.gate)
        for batch in in_batches(setup.workload.measured, setup.settings.batch_size):
            server.serve(batch)
        runtime.drain()
    return probe


# From times to costs ------------------------------------------------------------------------------


def compute_samples(
    probe: Probe, traced: Mapping[int, TracedRequest], layers: int
) -> dict[str, list[Sample]]:
    """Split iterations with every expert resident into start, dense, finish and expert.

    What passes between two experts counts for the second; the last iteration of all is left out.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    experts = (span for span in probe.spans if span.track.startswith("device"))
    steps: dict[int, int] = defaultdict(int)
    gates = iter(probe.gates)
    for (iteration, began), (following, next_began) in itertools.pairwise(probe.begins):
        routed = [traced[number].steps[steps[number]] for number in iteration.requests]
        contexts = [traced[number].steps[0].tokens + steps[number] for number in iteration.requests]
        for number in iteration.requests:
            steps[number] += 1
        tokens, context = sum(iteration.tokens), sum(contexts)
        counts = np.sum([step.counts for step in routed], axis=0)
        ended, dense = began, []
        for outcome, asked in itertools.islice(gates, layers):
            dense.append(asked - ended)
            ended = asked
            for _ in outcome.activated:
                span = next(experts)
                samples["_order"].append(Sample(outcome.layer, 0, span.end - ended))
                ended = span.end
            order = outcome.hits
            for index, sample in zip(order, samples.pop("_order"), strict=True):
                computed = int(counts[outcome.layer, index])
                samples["expert"].append(Sample(computed, 0, sample.seconds))
        first, *others = dense
        samples["dense"] += [Sample(tokens, context, seconds) for seconds in others]
        samples["start"].append(Sample(tokens, context, first - float(np.mean(others))))
        if following.phase == "decode":
            samples["finish"].append(Sample(tokens, context, next_began - ended))
    return dict(samples)


def fitted(samples: Sequence[Sample], context: bool) -> dict[str, float]:
    """Return base, per_token and, if asked for, per_context in microseconds, none below 0.

    Least squares over the relative errors of the means of equal tokens and context.
    """
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        groups[sample.tokens, sample.context if context else 0].append(sample.seconds * 1e6)
    keys = np.array(list(groups), dtype=float)
    means = np.array([np.mean(values) for values in groups.values()])
    weights = np.sqrt([len(values) for values in groups.values()]) / np.maximum(means, 1e-3)
    columns = [np.ones(len(keys)), keys[:, 0], *([keys[:, 1]] if context else [])]
    solution, _ = nnls(np.stack(columns, axis=1) * weights[:, None], means * weights)
    names = ("base", "per_token", "per_context")
    return {name: round(float(value), 4) for name, value in zip(names, solution, strict=False)}


def added_wait(probe: Probe, load_seconds: float) -> float:
    """Return what a load takes beyond its time on the link, in microseconds.

    From a gate that finds nothing to the first expert computed, less one load: waking the link and
    the model's thread. A layer's loads follow one another without, so each bears its share.
    """
    experts = iter([span for span in probe.spans if span.track.startswith("device")])
    shares = []
    for outcome, asked in probe.gates:
        spans = list(itertools.islice(experts, len(outcome.activated)))
        if len(outcome.misses) == len(outcome.activated) and outcome.iteration.phase == "decode":
            wait = spans[-1].start - asked - load_seconds * len(outcome.misses)
            shares.append(max(0.0, wait) / len(outcome.misses))
    if not shares:
        raise UserError("no layer missed all its experts; lower memory_budget")
    return _micros(shares)


def collecting(probe: Probe) -> float:
    """Return what handing over one context takes of the critical path, in microseconds."""
    spans = probe.seconds("context_collection")
    contexts = len(probe.begins) + len(probe.gates)
    return round(sum(spans) / contexts * 1e6, 2) if spans else 0.0


def predicting(probe: Probe, layers: int) -> dict[str, float]:
    """Return what the policy's calls take, in microseconds; one on_embeddings, then L on_gates."""
    search = probe.seconds("search")
    if not search:
        return {}
    width = layers + 1
    gates = [seconds for place, seconds in enumerate(search) if place % width]
    return {
        "embeddings": _micros(search[::width]),
        "gate": _micros(gates),
        "update": round(sum(probe.seconds("update")) / len(probe.begins) * 1e6, 2),
    }


def _micros(seconds: Iterable[float]) -> float:
    return round(float(np.mean(list(seconds))) * 1e6, 2)


# The command --------------------------------------------------------------------------------------


def calibrate(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Measure and return the testbed as conf/testbed would hold it. Raises UserError."""
    testbed = build(cfg.testbed)
    if not isinstance(testbed, Testbed) or testbed.mode != "emulated":
        raise UserError(f"testbed={cfg.testbed.get('name', 'local')}: calibrate an emulated one")
    if len(testbed.devices) > 1:
        raise UserError("testbed.devices: calibrate one device; they share this machine's cores")
    resident = _cut(prepare(as_run(cfg, NEUTRAL, memory_budget="100%"), testbed))
    layers = resident.model.offloaded.shape.layers
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        record_setup(resident, path, console)
        with TraceReader(path) as trace:
            traced = {number: trace.request(number) for number in trace.numbers}
    samples = compute_samples(observed(resident, console), traced, layers)
    compute = {part: fitted(samples[part], part != "expert") for part in sorted(samples)}
    collect, prediction, latency = {"resident": 0.0}, {}, 0.0
    load = testbed.load_seconds(resident.model.full_expert_bytes)
    for system in cfg.systems:
        run = as_run(cfg, system, memory_budget=cfg.memory_budget)
        probe = observed(_shortened(prepare(run, testbed)), console)
        collect[system] = collecting(probe)
        prediction[system] = predicting(probe, layers)
        if system == NEUTRAL:
            latency = added_wait(probe, load) + testbed.link_latency_s * testbed.time_scale * 1e6
    return {
        "_target_": "experiments.calibrated_testbed.calibrated",
        "name": str(cfg.name),
        "model": str(cfg.model.name),
        "devices": 1,
        "link": {
            "gb_s": testbed.link_gb_s,
            "time_scale": testbed.time_scale,
            "latency_us": round(latency, 2),
        },
        "chunk_mb": testbed.chunk_bytes / 1e6,
        "compute_us": compute,
        "collect_us": collect,
        "prediction_us": prediction,
    }


def _cut(setup: Setup) -> Setup:
    """Give the measured prompts different lengths, which tell tokens, context and base apart."""
    measured = [
        replace(request, prompt=request.prompt[: max(2, len(request.prompt) * share // 8)])
        for request, share in zip(setup.workload.measured, itertools.cycle((1, 8, 3)))
    ]
    return replace(setup, workload=replace(setup.workload, measured=tuple(measured)))


def _shortened(setup: Setup) -> Setup:
    """Leave one measured request: it asks for hundreds of predictions."""
    return replace(setup, workload=replace(setup.workload, measured=setup.workload.measured[:1]))


def write_testbed(path: Path, testbed: dict[str, Any]) -> None:
    """Write the YAML, whole or not at all, with where it comes from in comments."""
    origin = provenance()
    head = (
        f"# Measured by python -m experiments.calibrate, {origin['date']}, "
        f"commit {origin['git_commit']},\n# on {origin['machine']['cpu']}, "
        f"{origin['machine']['cores']} cores. Times in microseconds.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(head + OmegaConf.to_yaml(OmegaConf.create(testbed)))
    os.replace(partial, path)


@hydra.main(config_path="../conf", config_name="calibrate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Calibrate as the config says; exit 2 for bad input."""
    try:
        path = Path(cfg.output)
        write_testbed(path, calibrate(cfg, Console()))
        print(f"written to {path}; testbed={path.stem} if it lies in conf/testbed")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
