"""The testbeds that conf/testbed names.

`local` is what is there, `emulated` paces real copies, `simulated` is hardware in virtual time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments.errors import UserError
from experiments.run.config import build, full_size
from finemoe.costs import Accelerator, RooflineCosts
from finemoe.offload.replay import PredictionCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.options import CHECKED, Flag, Micros, Number, Rate, Share, Text
from finemoe.testbed import SimulatedTestbed, Testbed

MB = 1_000_000
FREE = "none: a bound, or a system that predicts nothing"

Few = Annotated[int, Field(strict=True, ge=1, le=1024)]
Megabytes = Annotated[Number, Field(ge=0.1, le=1e6)]
Call = Literal["embeddings", "gate", "update"]
CALLS: tuple[Call, ...] = get_args(Call)
PredictionMicros = Mapping[Call, Micros]


@dataclass(frozen=True, config=CHECKED)
class SimulatedLink:
    """One link of a simulated testbed: its nominal rate, the share of it that is achieved."""

    gb_s: Rate
    efficiency: Share
    latency_us: Micros


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

    cpus = (torch.device("cpu"),) * devices
    return Testbed(
        "emulated",
        "emulated",
        cpus,
        chunk_bytes=round(chunk_mb * MB),
        link_gb_s=link_gb_s,
        link_latency_s=latency_us * 1e-6,
        time_scale=time_scale,
        threads=threads,
        cores=cores_apart(threads or torch.get_num_threads()) if pinned else None,
    )


def cores_apart(threads: int) -> tuple[frozenset[int], frozenset[int]]:
    """Return as many of this thread's cores as the model has threads, and those that are left.

    Raises UserError if none are left, or the system lets nobody choose.
    """
    refusal = "testbed.pinned=true: {}; set it to false"
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(refusal.format("this system does not let a program choose its cores"))
    cores = sorted(os.sched_getaffinity(0))
    if threads >= len(cores):
        few = f"{len(cores)} cores leave none beside {threads} of the model"
        raise UserError(refusal.format(few))
    return frozenset(cores[:threads]), frozenset(cores[threads:])


def local(devices: Few | None, chunk_mb: Megabytes) -> Testbed:
    """Return the CUDA devices of this machine, all of them or the first `devices`."""
    import torch

    there = torch.cuda.device_count()
    if not there:
        raise UserError("testbed=local needs a CUDA device and finds none; use testbed=emulated")
    if devices is not None and devices > there:
        raise UserError(
            f"testbed.devices={devices}, but this machine has {there} CUDA devices; lower it"
        )
    chosen = tuple(torch.device("cuda", index) for index in range(devices or there))
    name = f"{len(chosen)} x {torch.cuda.get_device_name(chosen[0])}"
    return Testbed(name, "measured", chosen, round(chunk_mb * MB))


def simulated(
    name: Text,
    devices: Few,
    accelerator: Accelerator,
    link: SimulatedLink,
    host_memory_gb_s: Rate,
    hop_us: Micros,
    collect_us: Micros,
    chunk_mb: Megabytes,
    chunks_in_flight: Few,
    prediction_us: Mapping[str, Mapping[str, PredictionMicros]],
) -> SimulatedTestbed:
    """Return hardware in virtual time, from the numbers that docs/testbeds.md explains."""
    bytes_per_second = link.gb_s * 1e9 * link.efficiency
    shared = host_memory_gb_s * 1e9
    rate = LinkRate(bytes_per_second, link.latency_us * 1e-6, shared, chunks_in_flight)

    def costs(model: DictConfig, system: str, predicts: bool) -> RooflineCosts:
        micros, source = _prediction(prediction_us, system, model.name, predicts)
        prediction = PredictionCosts(**{call: value * 1e-6 for call, value in micros.items()})
        return RooflineCosts(
            accelerator,
            full_size(model),
            prediction=prediction,
            prediction_source=source,
            parallel=devices > 1,
            collect=collect_us * 1e-6 + accelerator.sync_us * 1e-6,
            hop=hop_us * 1e-6 if devices > 1 else 0.0,
        )

    room = accelerator.memory_gb * 1e9
    return SimulatedTestbed(name, devices, round(chunk_mb * MB), rate, costs, room)


def _prediction(
    known: Mapping[str, Mapping[str, PredictionMicros]], system: str, model: str, predicts: bool
) -> tuple[Mapping[Call, float], str]:
    """Return what each call of a system's policy costs on a model, and of what that was measured.

    What nobody measured costs, call by call, as much as the dearest that was: another model of the
    same system, or else any system. So nothing gains by being unknown.
    """
    if not predicts:
        return {}, FREE
    if model in known.get(system, {}):
        return known[system][model], f"{system} on {model}"
    like = {system: known[system]} if known.get(system) else known
    measured = [calls for models in like.values() for calls in models.values()]
    dearest = {call: max(one.get(call, 0.0) for one in measured) for call in CALLS if measured}
    source = ", ".join(like) or "nothing, so free"
    return dearest, f"assumed, as nobody measured {system} on {model}: the dearest of {source}"


def auto(devices: Few, **numbers: Any) -> Testbed | SimulatedTestbed:
    """Return the CUDA devices of this machine if there are any, else the simulated testbed."""
    import torch

    if torch.cuda.device_count():
        return local(None, numbers["chunk_mb"])
    numbers |= {"_target_": "experiments.run.testbeds.simulated", "devices": devices}
    return build(OmegaConf.create({"testbed": numbers}).testbed)
