"""Measure what serving costs here: ``python -m experiments.validate.calibrate output=FILE``."""

import copy
import itertools
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import transformers
from omegaconf import DictConfig, OmegaConf
from scipy.optimize import nnls

from experiments.errors import UserError, command
from experiments.run.config import build, run_config
from experiments.run.console import Console
from experiments.run.live import LiveBackend, LiveSetup, load_setup
from experiments.run.protocol import build_history
from experiments.run.records import provenance
from experiments.run.schedule import Request, Server
from experiments.validate import probe as parts
from experiments.validate.probe import Probe, Sample
from finemoe.files import atomic_write
from finemoe.offload.device import EmulatedLink
from finemoe.testbed import Testbed
from finemoe.trace import TraceReader

NEUTRAL = "on_demand"  # the system whose runs show waits and links alone: it predicts nothing
DISTURBED = ("after_wait", "while_copying")


def emulated_testbed(cfg: DictConfig) -> Testbed:
    """Return the config's testbed. Raises UserError if it is no emulated one."""
    testbed = build(cfg.testbed)
    if not isinstance(testbed, Testbed) or testbed.mode != "emulated":
        raise UserError(f"testbed={cfg.testbed.get('name', 'local')}: use testbed=emulated")
    return testbed


def fit(samples: Sequence[Sample], columns: Sequence[str]) -> dict[str, float]:
    """Return base, per_token and the other columns asked for in microseconds, none below 0.

    Least squares over the relative errors of the means of samples that agree in these columns.
    """
    costs = ["per_token", "per_context", "seconds", "after_wait", "while_copying"]
    names = ["base", "per_token", *columns]
    frame = pd.DataFrame(samples).set_axis(costs, axis=1).assign(base=1)
    seconds = frame.groupby(names)["seconds"]
    groups = [(key, parts.without_outliers(one * 1e6)) for key, one in seconds]
    means = np.array([np.mean(values) for _, values in groups])
    weights = np.sqrt([len(values) for _, values in groups]) / np.maximum(means, 1e-3)
    matrix = np.array([key for key, _ in groups], dtype=float)
    solution, _ = nnls(matrix * weights[:, None], means * weights)
    return {name: round(float(value), 4) for name, value in zip(names, solution, strict=True)}


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 2)


class Calibration:
    """Watches live runs of the config's systems and turns what it saw into a testbed.

    Compute is measured with every expert resident and, for each system, under small budgets, where
    waits and copies disturb it; predictions and wake-ups under these alone. Whatever is observed
    again counts as well. Raises UserError for a testbed that cannot be calibrated.
    """

    def __init__(self, cfg: DictConfig, console: Console) -> None:
        testbed = emulated_testbed(cfg)
        if len(testbed.devices) > 1:
            raise UserError("testbed.devices: calibrate one device; all share this machine's cores")
        self._cfg, self._console, self._testbed = cfg, console, testbed
        resident = run_config(cfg, NEUTRAL, memory_budget="100%")
        self._resident = _vary_lengths(load_setup(resident, testbed))
        self._layers = self._resident.shape.layers
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.parquet"
            self._resident.record_routing(path, console)
            with TraceReader(path) as trace:
                self._traced = {number: trace.request(number) for number in trace.numbers}
        self._samples: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
        """By system, or `resident`, and by the part of a forward pass that they are of."""
        self._probes: dict[str, Probe] = defaultdict(Probe)

    def observe_resident(self) -> None:
        self._observe("resident", self._resident)

    def observe(self, system: str) -> None:
        for budget in self._cfg.memory_budgets:
            run = run_config(self._cfg, system, memory_budget=budget)
            setup = _vary_lengths(load_setup(run, self._testbed))
            # The longest request asks for hundreds of predictions.
            longest = max(setup.workload.measured, key=lambda one: len(one.prompt))
            self._probes[system] += self._observe(system, _measuring(setup, [longest]))

    def _observe(self, system: str, setup: LiveSetup) -> Probe:
        """Serve warm-up and measured requests under the budget; return the times of the latter."""
        build_history(setup, self._console)
        policy = copy.deepcopy(setup.policy)
        reference = setup.reference(self._console)
        if reference is not None and policy.set_future_routing:
            policy.set_future_routing(reference.routing)
        probe, schedule = Probe(), setup.settings.schedule
        with setup.under_budget(policy, probe) as runtime:
            server = Server(LiveBackend(runtime, before=lambda step: probe.begin(step.iteration)))
            list(server.serve(schedule(setup.workload.warmup)))
            runtime.drain()
            probe.begins.clear()
            probe.spans.clear()
            runtime.listeners.append(probe.gate)
            list(server.serve(schedule(setup.workload.measured)))
            runtime.drain()
            for link in runtime.links:
                if isinstance(link, EmulatedLink):
                    probe.lags += link.lags
                    probe.lag_seconds += link.lag_seconds
        for part, taken in parts.compute_samples(probe, self._traced, self._layers).items():
            self._samples[system][part] += taken
        return probe

    def testbed(self) -> dict[str, Any]:
        testbed, probes = self._testbed, self._probes
        load = testbed.load_seconds(self._resident.model.full_expert_bytes)
        every = sum(probes.values(), Probe())
        wake = resume = 0.0
        if NEUTRAL in probes:
            wake, resume = parts.wake_and_resume(probes[NEUTRAL], load)
        # What handing over one context takes of the critical path.
        collect = {
            name: _micros(sum(one.seconds("context_collection")) / len([*one.begins, *one.gates]))
            for name, one in probes.items()
        }
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
                "lag_us": _micros(every.lag_seconds / max(every.lags, 1)),
            },
            "chunk_mb": testbed.chunk_bytes / 1e6,
            "resume_us": _micros(resume),
            "compute_us": self._compute(),
            "collect_us": {"resident": 0.0, **collect},
            "prediction_us": {
                name: {k: _micros(v) for k, v in parts.call_seconds(one, self._layers).items()}
                for name, one in probes.items()
            },
        }

    def _compute(self) -> dict[str, Any]:
        still = self._samples["resident"]
        costs: dict[str, Any] = {}
        for part in ("start", "finish"):
            costs[part] = fit(still[part], ["per_context"])
        for part, own in (("dense", ["per_context"]), ("expert", [])):
            costs[part] = {"resident": fit(still[part], own)}
            for system in self._probes:
                disturbed = still[part] + self._samples[system][part]
                costs[part][system] = fit(disturbed, [*own, *DISTURBED])
        return costs


def _measuring(setup: LiveSetup, measured: Sequence[Request]) -> LiveSetup:
    return replace(setup, workload=replace(setup.workload, measured=tuple(measured)))


def _vary_lengths(setup: LiveSetup) -> LiveSetup:
    """Give the measured prompts different lengths, which tell tokens, context and base apart."""
    shares = zip(setup.workload.measured, itertools.cycle((1, 8, 3)))
    lengths = [(one, max(2, len(one.prompt) * share // 8)) for one, share in shares]
    return _measuring(setup, [replace(one, prompt=one.prompt[:cut]) for one, cut in lengths])


def write_testbed(path: Path, testbed: Any, by: str = "experiments.validate.calibrate") -> None:
    """Write the YAML, whole or not at all, with where it comes from in comments."""
    origin = provenance()
    head = (
        f"# Measured by python -m {by}, {origin['date']}, commit {origin['git_commit']},\n"
        f"# on {origin['machine']['cpu']}, {origin['machine']['cores']} cores.\n"
    )
    with atomic_write(path) as partial:
        partial.write_text(head + OmegaConf.to_yaml(OmegaConf.create(testbed)))


@hydra.main(config_path="../../conf", config_name="calibrate", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Calibrate as the config says; exit 2 for bad input."""
    transformers.logging.disable_progress_bar()
    path, calibration = Path(cfg.output), Calibration(cfg, Console())
    calibration.observe_resident()
    for system in cfg.systems:
        calibration.observe(system)
    write_testbed(path, calibration.testbed())
    print(f"written to {path}; testbed={path.stem} if it lies in conf/testbed")


if __name__ == "__main__":
    main()
