"""The testbeds that conf/testbed names: what is there (`local`), paced copies (`emulated`)."""

from __future__ import annotations

from typing import Any

import torch

from experiments.errors import UserError
from finemoe.testbed import Testbed

MB = 1_000_000


def emulated(
    devices: int,
    link_gb_s: float,
    latency_us: float,
    time_scale: float,
    chunk_mb: float,
    threads: int | None,
) -> Testbed:
    """Return CPU devices whose links take the time of full-size experts on a real link."""
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
    )


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


def auto(devices: int | None, chunk_mb: float, **emulation: Any) -> Testbed:
    """Return the CUDA devices if there are any, else an emulated testbed, of one device if None."""
    if torch.cuda.device_count():
        return local(devices, chunk_mb)
    return emulated(devices=devices or 1, chunk_mb=chunk_mb, **emulation)


def _chunk_bytes(chunk_mb: float) -> int:
    if not isinstance(chunk_mb, float | int) or chunk_mb * MB < 1:
        raise UserError(f"testbed.chunk_mb={chunk_mb}: give a number above 0")
    return round(chunk_mb * MB)
