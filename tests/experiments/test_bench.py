from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import bench
from experiments.overheads import Check
from experiments.small_models import small_model


def test_bench_writes_every_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    model, output = tmp_path / "model", tmp_path / "out" / "bench.json"
    small_model("mixtral").save_pretrained(model)
    options = {"model": model, "output": output, "rounds": 1, "tokens": 4, "time-scale": 0.01}
    bench.main([f"--{name}={value}" for name, value in options.items()])
    record = json.loads(output.read_text())
    ratios = [check for check in record["checks"] if check["met"] is not None]
    assert len(ratios) == 6
    assert all(math.isfinite(check["value"]) and check["value"] > 0 for check in ratios)
    assert {"machine", "versions", "git_commit"} <= record.keys()
    assert not list(output.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("check", "met"),
    [
        (Check("a", 1.1, at_most=1.10), True),
        (Check("a", 1.2, at_most=1.10), False),
        (Check("a", 0.94, at_least=0.95), False),
        (Check("a", math.nan, at_least=0.95), False),
        (Check("a", 5.0, "ms"), None),
    ],
)
def test_a_check_is_met_only_within_its_bound(check: Check, met: bool | None) -> None:
    assert check.met is met
