"""Measure what serving costs on this machine: ``python -m experiments.calibrate output=FILE``.

Serves a few prompts of their own with the live runtime and writes a testbed in which the same
hardware runs in virtual time. Compute is measured with every expert resident and, for each system,
under small budgets, where waits and copies disturb it; predictions and wake-ups under these alone.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf
from scipy.optimize import nnls

from experiments.console import Console
from experiments.errors import BAD_INPUT, UserError
from experiments.first_pass import first_pass
from experiments.harness import build_history
from experiments.probe import (
    Probe,
    Sample,
    collecting,
    compute_samples,
    predicting,
    undisturbed,
    waking,
)
from experiments.recording import record_setup
from experiments.records import provenance
from experiments.serving import Server, in_batches
from experiments.setup import Setup, build, prepare, under_budget
from finemoe.testbed import Testbed
from finemoe.trace import TracedRequest
from finemoe.trace_file import TraceReader

NEUTRAL = "on_demand"
"""The system whose runs show waits and links alone: it predicts nothing."""
COLUMNS: dict[str, Callable[[Sample], float]] = {
    "per_context": lambda sample: sample.context,
    "after_wait": lambda sample: sample.waited,
    "while_copying": lambda sample: sample.copying,
}
"""What a part's seconds may depend on besides tokens."""
CONTEXT = ("per_context",)
DISTURBED = ("after_wait", "while_copying")


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
    traced = _routing(resident, console)
    still = compute_samples(observed(resident, console), traced, layers)
    compute: dict[str, Any] = {p: fitted(still[p], CONTEXT) for p in ("start", "finish")}
    compute["dense"] = {"resident": fitted(still["dense"], CONTEXT)}
    compute["expert"] = {"resident": fitted(still["expert"], ())}
    collect, prediction, wake, resume = {"resident": 0.0}, {}, 0.0, 0.0
    load = testbed.load_seconds(resident.model.full_expert_bytes)
    for system in cfg.systems:
        probe = Probe()
        dense, expert = list(still["dense"]), list(still["expert"])
        for budget in cfg.memory_budgets:
            run = as_run(cfg, system, memory_budget=budget)
            seen = observed(_shortened(_cut(prepare(run, testbed))), console)
            found = compute_samples(seen, traced, layers)
            dense, expert = dense + found["dense"], expert + found["expert"]
            probe += seen
        compute["dense"][system] = fitted(dense, (*CONTEXT, *DISTURBED))
        compute["expert"][system] = fitted(expert, DISTURBED)
        collect[system] = _micros(collecting(probe))
        prediction[system] = {k: _micros(v) for k, v in predicting(probe, layers).items()}
        if system == NEUTRAL:
            wake, resume = waking(probe, load)
    return {
        "_target_": "experiments.calibrated_testbed.calibrated",
        "name": str(cfg.name),
        "model": str(cfg.model.name),
        "devices": 1,
        "link": {
            "gb_s": testbed.link_gb_s,
            "time_scale": testbed.time_scale,
            "latency_us": _micros(testbed.link_latency_s * testbed.time_scale),
            "wake_us": _micros(wake),
        },
        "chunk_mb": testbed.chunk_bytes / 1e6,
        "resume_us": _micros(resume),
        "compute_us": compute,
        "collect_us": collect,
        "prediction_us": prediction,
    }


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
        raise SystemExit(BAD_INPUT) from None


if __name__ == "__main__":
    main()
