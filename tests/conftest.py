"""Every test runs on one compute thread, without a network, and as long as a busy machine takes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


LONG = ("test_results", "test_driver", "test_cuda", "test_gpu", "test_run", "test_live_and_replay")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that processes which share them end together."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw coarse pictures, in one of a figure's formats, which is much sooner done."""
    save = Figure.savefig

    def sooner(figure: Figure, file: Path, format: str, **options: Any) -> None:
        save(figure, file, format=format, dpi=40) if format == "png" else file.touch()

    monkeypatch.setattr(Figure, "savefig", sooner)
