"""The testbeds of conf/testbed: what is there, real copies that are paced, and virtual time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from experiments import CONF
from experiments.errors import UserError, refusing
from experiments.run.config import build, checked, full_size
from finemoe.costs import Accelerator, Line, LinearCosts, Processor, RooflineCosts
from finemoe.offload.runtime import Extra, PredictionCosts, ThreadCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.options import Flag, Micros, Number, Rate, Share, Text, schema
from finemoe.testbed import SimulatedTestbed, Testbed, cuda_devices

if TYPE_CHECKING:
    import torch

MB = 1_000_000
LINK_CHUNK_MB = 16.0  # a demand waits for two: a third of a millisecond each over PCIe 4.0 x16
AGAIN = "calibrate again: python -m experiments.validate.calibrate"
FREE = "none: a bound, or a system that predicts nothing"

Few = Annotated[int, Field(strict=True, ge=1, le=1024)]
Megabytes = Annotated[Number, Field(ge=0.1, le=1e6)]
Call = Literal["embeddings", "gate", "update", "embeddings_token", "gate_token", "update_token"]
SystemMicros = Mapping[str, Micros]
# One link: its nominal rate, and the share of it that is achieved.
SimulatedLink: Any = schema("forbid", gb_s=Rate, efficiency=Share, latency_us=Micros)


def emulated(
    devices: Few,
    link_gb_s: Rate,
    latency_us: Micros,
    time_scale: Annotated[Number, Field(gt=0, le=1e6)],
    chunk_mb: Megabytes,
    threads: Few | None,
    pinned: Flag = False,
) -> Testbed:
    """Return CPU devices whose links take the time of full-size experts on a real link.

    With `pinned`, links and searcher never run on the model's cores. Raises UserError for a testbed
    that cannot be.
    """
    import torch

    return Testbed(
        "emulated",
        "emulated",
        (torch.device("cpu"),) * devices,
        chunk_bytes=round(chunk_mb * MB),
        link_gb_s=link_gb_s,
        link_latency_s=latency_us * 1e-6,
        time_scale=time_scale,
        threads=threads,
        cores=cores_apart(threads or torch.get_num_threads()) if pinned else None,
    )


def cores_apart(threads: int) -> tuple[frozenset[int], frozenset[int]]:
    """Return cores for the model's threads, and those left; UserError if there are none."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if threads >= len(cores):
        cause = f"testbed.pinned=true: {len(cores)} cores to choose from leave none beside"
        raise UserError(f"{cause} the model's {threads}; set it to false")
    return frozenset(cores[:threads]), frozenset(cores[threads:])


def local(devices: Few | None, chunk_mb: Megabytes | None) -> Testbed:
    """Return the CUDA devices of this machine, all of them or the first `devices`.

    Chunks are of `LINK_CHUNK_MB` for each device if nothing is said: all links' threads together
    then take as much of the interpreter as one link's.
    """
    import torch

    there = cuda_devices()
    if not there and torch.cuda.device_count():
        remedy = "update it, or install torch for an older CUDA (pytorch.org/get-started/locally)"
        raise UserError(f"NVIDIA driver is too old for torch's CUDA {torch.version.cuda}; {remedy}")
    if there < (devices or 1):
        cause = f"testbed=local needs {devices or 1} CUDA device(s) and finds {there}"
        raise UserError(f"{cause}; lower testbed.devices or use testbed=emulated")
    chosen = tuple(torch.device("cuda", index) for index in range(devices or there))
    name = " + ".join(f"{count} x {kind}" for kind, count in kinds(chosen).items())
    return Testbed(name, "measured", chosen, round((chunk_mb or LINK_CHUNK_MB * len(chosen)) * MB))


def kinds(devices: Sequence[torch.device]) -> Counter[str]:
    """Count CUDA devices by name and, if they are not alike, memory."""
    import torch

    found = [(torch.cuda.get_device_name(one), torch.cuda.mem_get_info(one)[1]) for one in devices]
    full = Counter(f"{name} ({size / 1e9:.0f} GB)" for name, size in found)
    return full if len(full) > 1 else Counter(name for name, _ in found)


def simulated(
    name: Text,
    devices: Few,
    accelerator: Accelerator,
    link: SimulatedLink,
    host_memory_gb_s: Rate,
    host: Processor | None,
    hop_us: Micros,
    collect_us: Micros,
    chunk_mb: Megabytes,
    chunks_in_flight: Few,
    layer_us: Micros,
) -> SimulatedTestbed:
    """Return hardware in virtual time, from the numbers that docs/testbeds.md explains."""
    own, shared = link.gb_s * 1e9 * link.efficiency, host_memory_gb_s * 1e9
    rate = LinkRate(own, link.latency_us * 1e-6, shared, chunks_in_flight)

    def costs(model: DictConfig, system: DictConfig, predicts: bool) -> RooflineCosts:
        micros, source = _prediction(system, model.name) if predicts else ({}, FREE)
        return RooflineCosts(
            accelerator,
            full_size(model),
            prediction=PredictionCosts(**_seconds(micros)),
            prediction_source=source,
            parallel=devices > 1,
            collect=collect_us * 1e-6 + accelerator.sync_us * 1e-6,
            hop=hop_us * 1e-6 if devices > 1 else 0.0,
            layer=layer_us * 1e-6,
            processor=host,
            link=rate,
        )

    room = accelerator.memory_gb * 1e9
    return SimulatedTestbed(name, devices, round(chunk_mb * MB), rate, costs, room)


def _prediction(system: Any, model: str) -> tuple[Mapping[Call, float], str]:
    """Return what each call of a system's policy costs on a model, and where that was measured."""
    label, own = system.label, _measured(system)
    if model in own:
        return own[model], f"{label} on {model}"
    systems = [system] if own else map(OmegaConf.load, sorted(CONF.glob("system/*.yaml")))
    like = {one.label: _measured(one) for one in systems}
    # The dearest, so that nothing gains by being unknown.
    measured = [calls for models in like.values() for calls in models.values()]
    dearest = {call: max(one.get(call, 0.0) for one in measured) for call in get_args(Call)}
    source = ", ".join(name for name, models in like.items() if models)
    return dearest, f"assumed, as nobody measured {label} on {model}: the dearest of {source}"


def _measured(system: Any) -> dict[str, dict[Call, float]]:
    """Return the microseconds of a system's calls by model, as its YAML has them."""
    kind = schema(prediction_us=(dict[str, dict[Call, Micros]] | None, None))
    values: Any = OmegaConf.to_container(system)
    return checked(kind, values, "system").prediction_us or {}


def calibrated(
    name: str,
    model: str,
    devices: Few,
    link: Mapping[Literal["gb_s", "time_scale", "latency_us", "wake_us", "lag_us"], Micros],
    chunk_mb: Megabytes,
    resume_us: Micros,
    compute_us: Mapping[str, Mapping[str, Micros | SystemMicros]],
    collect_us: SystemMicros,
    prediction_us: Mapping[str, Mapping[Call, Micros]],
) -> SimulatedTestbed:
    """Return the testbed that `python -m experiments.validate.calibrate` wrote.

    `latency_us` of `link` is already stretched by its `time_scale`. `compute_us` holds a line each
    for start and finish and, for each system, for dense and expert, with `after_wait` and
    `while_copying` (`ThreadCosts`); the others a number, or one a call, for each system. Raises
    UserError for another model than the calibrated one, and for a system that was not measured.
    """
    kinds = (ArithmeticError, AttributeError, KeyError, TypeError)
    with refusing(f"testbed {name}", *kinds, remedy=AGAIN):
        (start, _), (finish, _) = (_disturbed(compute_us[part]) for part in ("start", "finish"))
        dense, expert = (
            {system: _disturbed(line) for system, line in compute_us[part].items()}
            for part in ("dense", "expert")
        )
        rate = LinkRate(
            link["gb_s"] * 1e9 / link["time_scale"],
            link["latency_us"] * 1e-6,
            lag=link["lag_us"] * 1e-6,
            wake=link["wake_us"] * 1e-6,
        )

    def costs(asked: DictConfig, system_cfg: DictConfig, predicts: bool) -> LinearCosts:
        system = system_cfg.label
        if asked.name != model:
            raise UserError(f"testbed {name}: calibrated with {model}, not {asked.name}; {AGAIN}")
        if not all(system in known for known in (dense, expert, collect_us)):
            raise UserError(f"testbed {name} knows no costs of system={system}; {AGAIN}")
        (dense_line, dense_extra), (expert_line, expert_extra) = dense[system], expert[system]
        return LinearCosts(
            start,
            dense_line,
            finish,
            expert_line,
            collect=collect_us[system] * 1e-6,
            prediction=PredictionCosts(**_seconds(prediction_us.get(system, {}))),
            prediction_source=f"{system} on {model}, on this machine",
            thread=ThreadCosts(resume_us * 1e-6, dense_extra, expert_extra),
        )

    chunk, scale = round(chunk_mb * MB), link["time_scale"]
    return SimulatedTestbed(name, devices, chunk, rate, costs, time_scale=scale)


def _disturbed(micros: Any) -> tuple[Line, Extra]:
    """Return a line, and what comes on top of it when the model's thread is disturbed."""
    seconds = _seconds(micros)
    extra = Extra(**{field.name: seconds.pop(field.name, 0.0) for field in fields(Extra)})
    return Line(**seconds), extra


def _seconds(micros: Mapping[Any, float]) -> dict[str, float]:
    return {name: us * 1e-6 for name, us in micros.items()}


def auto(devices: Few, **numbers: Any) -> Testbed | SimulatedTestbed:
    """Return what testbed=local is if there are CUDA devices, else the simulated testbed."""
    if cuda_devices():
        return local(None, None)
    numbers |= {"_target_": "experiments.run.testbeds.simulated", "devices": devices}
    return build(OmegaConf.create({"testbed": numbers}).testbed)
