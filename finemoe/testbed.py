"""Testbeds: which devices experts are offloaded from, over which links, in which mode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finemoe.offload.runtime import CostModel
from finemoe.offload.virtual_links import LinkRate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Testbed:
    """Devices and their links; an emulated link is paced as if it carried full-size experts."""

    __test__ = False

    name: str
    mode: Literal["measured", "emulated"]
    devices: tuple["torch.device", ...]
    chunk_bytes: int  # bytes of a full-size expert that are copied at once
    link_gb_s: float = 0.0
    link_latency_s: float = 0.0  # what every emulated transfer adds
    time_scale: float = 1.0  # factor on the time that emulated links take
    threads: int | None = None  # for operations on the CPU; None leaves torch's default
    cores: tuple[frozenset[int], frozenset[int]] | None = None
    """Those of the model's thread, and those of links and searcher; None leaves them free."""

    def load_seconds(self, expert_bytes: int) -> float:
        """Return how long an emulated link takes for one full-size expert."""
        return (expert_bytes / (self.link_gb_s * 1e9) + self.link_latency_s) * self.time_scale


def cuda_devices() -> int:
    """Return how many CUDA devices torch can use: none with a driver too old for its CUDA."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@dataclass(frozen=True)
class SimulatedTestbed:
    """Devices and links in virtual time."""

    name: str
    devices: int
    chunk_bytes: int
    rate: LinkRate
    costs: Callable[[Any, Any, bool], CostModel]
    """Returns the costs of a model under a system (their configs), which may predict."""
    device_bytes: float = float("inf")
    time_scale: float = 1.0  # factor on the time of links, as of an emulated testbed
    mode: Literal["simulated"] = "simulated"
