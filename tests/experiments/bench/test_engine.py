"""The benches, as commands at a tiny size: what they write is of what they ran."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import engine as bench
from experiments.bench import prediction as prediction_bench
from experiments.run.models import small_model


def written(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    assert {"machine", "versions", "git_commit"} <= record.keys()
    return record


def test_no_link_beats_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    model, output = tmp_path / "model", tmp_path / "out" / "bench.json"
    small_model("mixtral").save_pretrained(model)
    options = {"model": model, "output": output, "rounds": 1, "tokens": 4, "time_scale": 0.01}
    bench.main([f"{name}={value}" for name, value in options.items()])
    values = {check["name"]: check["value"] for check in written(output)["checks"]}
    assert all(0 < value < math.inf for value in values.values())
    assert values["emulated link, achieved / configured rate"] <= 1.001
    assert values["FineMoE synchronous work / decode iteration"] < 1


def test_every_call_of_each_system_is_timed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(prediction_bench, "CALLS", 3)
    monkeypatch.setattr(prediction_bench, "REQUESTS", 2)
    words = ["models=qwen", "systems=finemoe,deepspeed", "model.hidden_size=4096"]
    prediction_bench.main([*words, f"output={tmp_path / 'times.json'}"])
    times = {one["system"]: one for one in written(tmp_path / "times.json")["times"]}
    assert times.keys() == {"finemoe", "deepspeed"}
    assert all(one["gate"] > 0 for one in times.values())
    # The semantic search reads every stored embedding; DeepSpeed looks nothing up.
    assert times["finemoe"]["embeddings"] > times["deepspeed"]["embeddings"]
    sizes = {"layers": 24, "experts": 60, "hidden_size": 4096}
    assert times["deepspeed"] | sizes == times["deepspeed"]
