"""The testbeds that conf/testbed names.

`local` is what is there, `emulated` paces real copies, `simulated` is hardware in virtual time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.errors import UserError
from finemoe.costs import Accelerator, FullSizeModel, RooflineCosts
from finemoe.offload.cores import Cores
from finemoe.offload.replay import PredictionCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.testbed import SimulatedTestbed, Testbed

MB = 1_000_000


def emulated(
    devices: int,
    link_gb_s: float,
    latency_us: float,
    time_scale: float,
    chunk_mb: float,
    threads: int | None,
    pinned: bool = False,
) -> Testbed:
    """Return CPU devices whose links take the time of full-size experts on a real link.

    With `pinned`, links and searcher never run on the model's cores. Raises UserError for a testbed
    that cannot be.
    """
    for name, value in (("devices", devices), ("threads", 1 if threads is None else threads)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"testbed.{name}={value}: give a whole number from 1")
    for name, factor in (("link_gb_s", link_gb_s), ("time_scale", time_scale)):
        if not isinstance(factor, float | int) or factor <= 0:
            raise UserError(f"testbed.{name}={factor}: give a number above 0")
    if not isinstance(latency_us, float | int) or latency_us < 0:
        raise UserError(f"testbed.latency_us={latency_us}: give a number from 0")
    return Testbed(
        "emulated",
        "emulated",
        (torch.device("cpu"),) * devices,
        chunk_bytes=_chunk_bytes(chunk_mb),
        link_gb_s=link_gb_s,
        link_latency_s=latency_us * 1e-6,
        time_scale=time_scale,
        threads=threads,
        cores=_cores(threads) if pinned else None,
    )


def _cores(threads: int | None) -> Cores:
    try:
        return Cores.apart(torch.get_num_threads() if threads is None else threads)
    except ValueError as error:
        raise UserError(f"testbed.pinned=true: {error}; set it to false") from error


def local(devices: int | None, chunk_mb: float) -> Testbed:
    """Return the CUDA devices of this machine, all of them or the first `devices`."""
    found = torch.cuda.device_count()
    if not found:
        raise UserError("testbed=local needs a CUDA device and finds none; use testbed=emulated")
    if devices is not None and not 1 <= devices <= found:
        raise UserError(f"testbed.devices={devices}, but this machine has {found} CUDA devices")
    chosen = tuple(torch.device("cuda", index) for index in range(devices or found))
    name = torch.cuda.get_device_name(chosen[0])
    return Testbed(f"{len(chosen)} x {name}", "measured", chosen, _chunk_bytes(chunk_mb))


def simulated(
    name: str,
    devices: int,
    accelerator: Mapping[str, float],
    link: Mapping[str, float],
    host_memory_gb_s: float,
    hop_us: float,
    collect_us: float,
    chunk_mb: float,
    chunks_in_flight: int,
    prediction_us: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> SimulatedTestbed:
    """Return hardware in virtual time, from the numbers that docs/testbeds.md explains.

    Raises UserError for one that cannot be.
    """
    for what, value in (("devices", devices), ("chunks_in_flight", chunks_in_flight)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"testbed.{what}={value}: give a whole number from 1")
    positive = {"host_memory_gb_s": host_memory_gb_s, **{f"link.{k}": v for k, v in link.items()}}
    for what, number in {**positive, "hop_us": hop_us, "collect_us": collect_us}.items():
        if not isinstance(number, float | int) or number < 0 or (number == 0 and "_us" not in what):
            raise UserError(f"testbed.{what}={number}: give a number above 0")
    if not 0 < link["efficiency"] <= 1:
        raise UserError(f"testbed.link.efficiency={link['efficiency']}: give a share, at most 1")
    try:
        device = Accelerator(**accelerator)
    except ValueError as error:
        raise UserError(f"testbed.accelerator: {error}") from error
    rate = LinkRate(
        link["gb_s"] * 1e9 * link["efficiency"],
        link["latency_us"] * 1e-6,
        host_memory_gb_s * 1e9,
        chunks_in_flight,
    )

    def costs(model: DictConfig, system: str) -> RooflineCosts:
        micros = prediction_us[system].get(model.name, {}) if system in prediction_us else {}
        prediction = PredictionCosts(**{call: value * 1e-6 for call, value in micros.items()})
        shapes = full_size(model)
        return RooflineCosts(device, shapes, prediction, devices, collect_us * 1e-6, hop_us * 1e-6)

    room = device.memory_gb * 1e9
    return SimulatedTestbed(name, devices, _chunk_bytes(chunk_mb), rate, costs, room)


def full_size(model: DictConfig) -> FullSizeModel:
    """Return the full-size shapes that conf/model gives."""
    return FullSizeModel(
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        hidden_size=model.hidden_size,
        expert_intermediate_size=model.expert_intermediate_size,
        **model.full_size,
    )


def auto(devices: int, **numbers: Any) -> Testbed | SimulatedTestbed:
    """Return the CUDA devices of this machine if there are any, else the simulated testbed."""
    if torch.cuda.device_count():
        return local(None, numbers["chunk_mb"])
    return simulated(devices=devices, **numbers)


def _chunk_bytes(chunk_mb: float) -> int:
    if not isinstance(chunk_mb, float | int) or chunk_mb * MB < 1:
        raise UserError(f"testbed.chunk_mb={chunk_mb}: give a number above 0")
    return round(chunk_mb * MB)
