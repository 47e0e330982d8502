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
    with wandb.init(
        project=logger.project,
        name=_name(record),
        config=record["config"],
        dir=str(folder),
        mode=_mode(),  # type: ignore[arg-type]
        tags=[record["mode"], record["weights"]],
        settings=wandb.Settings(silent=True),
    ) as run:
        run.summary.update(record["summary"])
        run.log({"requests": wandb.Table(dataframe=table)})


def log_reproduction(project: str, results: Path) -> None:
    """Log the figures and the claims table of a reproduction as one run of W&B."""
    import wandb

    with wandb.init(
        project=project,
        name="reproduction",
        dir=str(results),
        mode=_mode(),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True),
    ) as run:
        pictures = sorted((results / "figures").glob("*.png"))
        run.log({f"figure {path.stem}": wandb.Image(str(path)) for path in pictures})
        claims = pd.read_csv(results / "claims.csv").astype({"digests": str, "cells": str})
        run.log({"claims": wandb.Table(dataframe=claims)})


def _name(record: dict[str, Any]) -> str:
    budget = record["memory_budget_gb"]
    held = "no budget" if budget is None else f"{budget:.1f}GB"
    return f"{record['system']}-{record['model']}-{held}"


def _mode() -> str:
    default = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return os.environ.get("WANDB_MODE", default)
