"""What a reproduction leaves with Weights & Biases, offline, with the real package."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pandas as pd
import pytest

from experiments.run.records import is_logged, log_record, write_record


def test_a_record_that_wandb_refuses_is_kept_and_logged_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SILENT": "true", "MODE": "online", "API_KEY": "no key"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    record = {
        **{"system": "finemoe", "model": "mixtral", "memory_budget_gb": 6.0, "mode": "simulated"},
        **{"weights": "scale", "config": {}, "summary": {"hits": 1}},
    }
    requests = pd.DataFrame({"ttft_s": [0.1], "itl_s": [[0.1]], "tokens": [[1, 2]]})
    path = write_record(tmp_path, record, requests)
    log_record("finemoe", tmp_path, record)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{path} is kept" in said
    assert not is_logged(path)
    # The next start.
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_record("finemoe", tmp_path, record)
    assert is_logged(path)
    # Done again, it is to be logged again.
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert not is_logged(path)
