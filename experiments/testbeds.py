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
    if devices < 1 or min(link_gb_s, time_scale, chunk_mb) <= 0 or latency_us < 0:
        raise UserError(
            "an emulated testbed needs devices >= 1 and positive link_gb_s, time_scale, chunk_mb"
        )
    return Testbed(
        "emulated",
        "emulated",
        (torch.device("cpu"),) * devices,
        chunk_bytes=round(chunk_mb * MB),
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
    return Testbed(f"{len(chosen)} x {name}", "measured", chosen, round(chunk_mb * MB))


def auto(chunk_mb: float, **settings: Any) -> Testbed:
    """Return the CUDA devices if there are any, else an emulated testbed."""
    if torch.cuda.device_count():
        return local(None, chunk_mb)
    return emulated(chunk_mb=chunk_mb, **settings)
