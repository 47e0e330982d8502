"""Where a run record goes besides its folder: Weights & Biases, offline unless a key is set."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.run.records import RECORD, REQUESTS

WAIT_SECONDS = 10  # for an answer of W&B


def is_logged(result: Path) -> bool:
    """Tell whether the file that completes a result was logged since it was written."""
    mark = _mark(result)
    return mark.exists() and mark.stat().st_mtime_ns >= result.stat().st_mtime_ns


def log_record(project: str, folder: Path, record: dict[str, Any]) -> None:
    """Log config, summary and request table of a complete record, unless that was done."""

    def log(run: Any, wandb: Any) -> None:
        table = pd.read_parquet(folder / REQUESTS).drop(columns=["itl_s", "tokens"])
        run.summary.update(record["summary"])
        run.log({"requests": wandb.Table(dataframe=table)})

    budget = record["memory_budget_gb"]
    size = "no budget" if budget is None else f"{budget:.1f}GB"
    name, tags = f"{record['system']}-{record['model']}-{size}", [record["mode"], record["weights"]]
    _log(folder / RECORD, log, project, name=name, config=record["config"], tags=tags)


def log_reproduction(project: str, report: Path) -> None:
    """Log the figures and the claims table beside a report as one run, unless that was done."""

    def log(run: Any, wandb: Any) -> None:
        pictures = sorted((report.parent / "figures").glob("*.png"))
        run.log({f"figure {path.stem}": wandb.Image(str(path)) for path in pictures})
        claims = pd.read_csv(report.parent / "claims.csv")
        claims = claims.astype({"digests": str, "cells": str})
        run.log({"claims": wandb.Table(dataframe=claims)})

    _log(report, log, project, name="reproduction")


def _log(result: Path, log: Callable[[Any, Any], None], project: str, **facts: Any) -> None:
    """Log a result and mark it so; if W&B fails, the result stays, and one line says why."""
    default = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    mode = os.environ.get("WANDB_MODE", default)
    if is_logged(result) or mode == "disabled":
        return
    os.environ["WANDB_SILENT"] = "true"
    try:
        import wandb

        settings = wandb.Settings(
            silent=True, init_timeout=WAIT_SECONDS, finish_timeout=60, finish_timeout_raises=True
        )
        facts |= {"dir": str(result.parent), "mode": mode}
        with wandb.init(project=project, settings=settings, **facts) as run:
            log(run, wandb)
        _mark(result).touch()
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"W&B: {cause}; {result} is kept, start again to log it", file=sys.stderr)
        # What follows in this process would wait as long.
        os.environ["WANDB_MODE"] = "disabled"


def _mark(result: Path) -> Path:
    return result.parent / "wandb" / "logged"
