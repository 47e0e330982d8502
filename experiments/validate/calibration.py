"""What serving costs on this machine, from live runs under observation, system by system.

Compute is measured with every expert resident and, for each system, under small budgets, where
waits and copies disturb it; predictions and wake-ups under these alone.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from scipy.optimize import nnls

from experiments.errors import UserError
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.first_pass import first_pass
from experiments.run.harness import build_history
from experiments.run.recording import record_setup
from experiments.run.serving import Server, in_batches
from experiments.run.setup import Setup, prepare, under_budget
from experiments.validate.probe import (
    Probe,
    Sample,
    collecting,
    compute_samples,
    predicting,
    undisturbed,
    waking,
)
from finemoe.offload.device import EmulatedLink
from finemoe.testbed import Testbed
from finemoe.trace import TracedRequest, TraceReader

NEUTRAL = "on_demand"
"""The system whose runs show waits and links alone: it predicts nothing."""
COLUMNS: dict[str, Callable[[Sample], float]] = {
    "per_context": lambda sample: sample.context,
    "after_wait": lambda sample: sample.waited,
    "while_copying": lambda sample: sample.copying,
}
"""What a part's seconds may depend on besides tokens."""
Samples = dict[str, list[Sample]]
"""By the part of a forward pass that they are of."""
CONTEXT = ("per_context",)
DISTURBED = ("after_wait", "while_copying")


# Serving under observation ------------------------------------------------------------------------


def as_run(cfg: DictConfig, system: str, **changes: Any) -> DictConfig:
    """Return the config that run.py would have for one system of this command's."""
    same = ("model", "dataset", "workload", "testbed", "weights", "seed", "output")
    plain: Any = {
        **{name: cfg[name] for name in same},
        **dict.fromkeys(("verify", "record", "timeline"), False),
        "routing": None,
        "system": cfg.systems[system],
        "store": {"load": None, "save": None},
        **changes,
    }
    return OmegaConf.create(plain)


def observed(setup: Setup, console: Console) -> Probe:
    """Serve warm-up and measured requests under the budget; return the times of the latter."""
    build_history(setup, console)
    policy = copy.deepcopy(setup.policy)
    reference = first_pass(setup, console)
    if reference is not None and policy.set_future_routing:
        policy.set_future_routing(reference.routing)
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
        for link in runtime.links:
            if isinstance(link, EmulatedLink):
                probe.lags += link.lags
                probe.lag_seconds += link.lag_seconds
    return probe


# From times to costs ------------------------------------------------------------------------------


def fitted(samples: Sequence[Sample], columns: Sequence[str]) -> dict[str, float]:
    """Return base, per_token and the other columns asked for in microseconds, none below 0.

    Least squares over the relative errors of the means of samples that agree in these columns.
    """
    groups: dict[tuple[float, ...], list[float]] = defaultdict(list)
    for sample in samples:
        row = (1, sample.tokens, *(float(COLUMNS[name](sample)) for name in columns))
        groups[row].append(sample.seconds * 1e6)
    kept = [undisturbed(values) for values in groups.values()]
    means = np.array([np.mean(values) for values in kept])
    weights = np.sqrt([len(values) for values in kept]) / np.maximum(means, 1e-3)
    matrix = np.array(list(groups), dtype=float)
    solution, _ = nnls(matrix * weights[:, None], means * weights)
    names = ("base", "per_token", *columns)
    return {name: round(float(value), 4) for name, value in zip(names, solution, strict=True)}


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 2)


# The calibration ----------------------------------------------------------------------------------


class Calibration:
    """Watches live runs of the config's systems and turns what it saw into a testbed.

    Everything may be observed several times: then no single moment of the machine decides. Raises
    UserError for a testbed that cannot be calibrated.
    """

    def __init__(self, cfg: DictConfig, console: Console) -> None:
        testbed = build(cfg.testbed)
        if not isinstance(testbed, Testbed) or testbed.mode != "emulated":
            name = cfg.testbed.get("name", "local")
            raise UserError(f"testbed={name}: calibrate an emulated one")
        if len(testbed.devices) > 1:
            raise UserError("testbed.devices: calibrate one device; all share this machine's cores")
        self._cfg, self._console, self._testbed = cfg, console, testbed
        self._resident = _cut(prepare(as_run(cfg, NEUTRAL, memory_budget="100%"), testbed))
        self._layers = self._resident.model.offloaded.shape.layers
        self._traced = _routing(self._resident, console)
        self._still: Samples = defaultdict(list)
        self._disturbed: dict[str, Samples] = defaultdict(lambda: defaultdict(list))
        self._probes: dict[str, Probe] = defaultdict(Probe)

    def observe_resident(self) -> None:
        """Serve with every expert resident."""
        seen = observed(self._resident, self._console)
        self._take(seen, self._still)

    def observe(self, system: str) -> None:
        """Serve with a system at every budget."""
        for budget in self._cfg.memory_budgets:
            run = as_run(self._cfg, system, memory_budget=budget)
            seen = observed(_shortened(_cut(prepare(run, self._testbed))), self._console)
            self._take(seen, self._disturbed[system])
            self._probes[system] += seen

    def testbed(self) -> dict[str, Any]:
        """Return the testbed as conf/testbed would hold it."""
        testbed, probes = self._testbed, self._probes
        load = testbed.load_seconds(self._resident.model.full_expert_bytes)
        lags = sum(probe.lags for probe in probes.values())
        lag_seconds = sum(probe.lag_seconds for probe in probes.values())
        wake, resume = waking(probes[NEUTRAL], load) if NEUTRAL in probes else (0.0, 0.0)
        return {
            "_target_": "experiments.run.testbeds.calibrated",
            "name": str(self._cfg.name),
            "model": str(self._cfg.model.name),
            "devices": 1,
            "link": {
                "gb_s": testbed.link_gb_s,
                "time_scale": testbed.time_scale,
                "latency_us": _micros(testbed.link_latency_s * testbed.time_scale),
                "wake_us": _micros(wake),
                "lag_us": _micros(lag_seconds / lags if lags else 0.0),
            },
            "chunk_mb": testbed.chunk_bytes / 1e6,
            "resume_us": _micros(resume),
            "compute_us": self._compute(),
            "collect_us": {
                "resident": 0.0,
                **{system: _micros(collecting(probe)) for system, probe in probes.items()},
            },
            "prediction_us": {
                system: {k: _micros(v) for k, v in predicting(probe, self._layers).items()}
                for system, probe in probes.items()
            },
        }

    def _take(self, seen: Probe, into: Samples) -> None:
        for part, samples in compute_samples(seen, self._traced, self._layers).items():
            into[part] += samples

    def _compute(self) -> dict[str, Any]:
        still = self._still
        compute: dict[str, Any] = {
            "start": fitted(still["start"], CONTEXT),
            "finish": fitted(still["finish"], CONTEXT),
            "dense": {"resident": fitted(still["dense"], CONTEXT)},
            "expert": {"resident": fitted(still["expert"], ())},
        }
        for system, found in self._disturbed.items():
            dense, expert = still["dense"] + found["dense"], still["expert"] + found["expert"]
            compute["dense"][system] = fitted(dense, (*CONTEXT, *DISTURBED))
            compute["expert"][system] = fitted(expert, DISTURBED)
        return compute


def _routing(setup: Setup, console: Console) -> dict[int, TracedRequest]:
    """Return what each request routes, by its number."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        record_setup(setup, path, console)
        with TraceReader(path) as trace:
            return {number: trace.request(number) for number in trace.numbers}


def _cut(setup: Setup) -> Setup:
    """Give the measured prompts different lengths, which tell tokens, context and base apart."""
    measured = [
        replace(request, prompt=request.prompt[: max(2, len(request.prompt) * share // 8)])
        for request, share in zip(setup.workload.measured, itertools.cycle((1, 8, 3)))
    ]
    return replace(setup, workload=replace(setup.workload, measured=tuple(measured)))


def _shortened(setup: Setup) -> Setup:
    """Leave the longest measured request: it asks for hundreds of predictions."""
    longest = max(setup.workload.measured, key=lambda request: len(request.prompt))
    return replace(setup, workload=replace(setup.workload, measured=(longest,)))
