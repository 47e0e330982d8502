"""What is said to fit, on devices whose free memory is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from experiments.run import room
from finemoe.offload.budget import spread
from finemoe.offload.policy import ModelShape

MIXTRAL = ModelShape(32, 8, 2, 4096)
EXPERT = 352_321_536
GPUS = tuple(torch.device("cuda", index) for index in range(6))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give devices, in order, so many free GB."""

    def give(*gigabytes: float) -> None:
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (int(gigabytes[device.index] * 1e9), 0)
        )

    return give


@pytest.mark.parametrize(
    ("gigabytes", "fit"),
    [
        ((80,), False),
        ((100,), True),
        ((20, 24, 24, 24, 24, 24), True),
        ((20, 24, 24, 15, 24, 24), False),
    ],
)
def test_all_experts_fit_the_devices_together_or_do_not(
    gigabytes: tuple[float, ...], fit: bool, free: Callable[..., None]
) -> None:
    free(*gigabytes)
    devices = GPUS[: len(gigabytes)]
    cause = room.shortage(devices, spread(MIXTRAL, len(devices)), EXPERT)
    assert (cause == "") is fit
