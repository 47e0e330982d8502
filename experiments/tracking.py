"""Where a run record goes besides its folder: Weights & Biases, offline unless a key is set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig


def log_record(logger: DictConfig, folder: Path, record: dict[str, Any], requests: Path) -> None:
    """Log config, summary and request table of a complete record, if the config asks for W&B."""
    if logger.name != "wandb":
        return
    import wandb

    table = pd.read_parquet(requests).drop(columns=["itl_s", "tokens"])
    default = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    mode = os.environ.get("WANDB_MODE", default)
    with wandb.init(
        project=logger.project,
        name=f"{record['system']}-{record['model']}-{record['memory_budget_gb']:.1f}GB",
        config=record["config"],
        dir=str(folder),
        mode=mode,  # type: ignore[arg-type]
        tags=[record["mode"], record["weights"]],
        settings=wandb.Settings(silent=True),
    ) as run:
        run.summary.update(record["summary"])
        run.log({"requests": wandb.Table(dataframe=table)})
