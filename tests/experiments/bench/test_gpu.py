import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from experiments.bench import gpu
from experiments.bench.engine import Check, measured
from experiments.bench.gpu import Bench, check, run_parts, summary
from experiments.run import weights
from tests.command import config, refusal, run_module
from tests.engine import saved_mixtral
from tests.pretend_cuda import pretend_cuda

LEFT_OUT = ("deepspeed", "mixtral_offload", "promoe", "moe_infinity", "planner", "hybrimoe")
SMALL = (
    *("sizes.expert_mb=0.004", "sizes.copies=4", "sizes.seconds=0.001", "sizes.matrix=256"),
    *("sizes.tokens=3", "sizes.rounds=1", "testbed.chunk_mb=0.1", "~models.qwen", "budgets=[1e-5]"),
    *("models.mixtral.layers=3", "models.mixtral.experts=4", "models.mixtral.hidden_size=16"),
    *("models.mixtral.expert_intermediate_size=16", "dataset=docs", "workload.prompts=2"),
    *("workload.history_share=0.5", "workload.output_tokens=2", "workload.input_tokens=4"),
    *(f"~system@systems.{one}" for one in LEFT_OUT),
)


def test_one_call_leaves_all_of_a_machine(tmp_path: Path, monkeypatch: Any) -> None:
    scale = saved_mixtral(tmp_path / "scale" / "mixtral", 3)
    monkeypatch.setattr(weights, "SCALE_MODELS", scale.parent)
    monkeypatch.setattr(gpu, "SCALE_MODEL", scale)
    monkeypatch.setattr(gpu, "FAMILIES", ("qwen2_moe",))
    monkeypatch.chdir(tmp_path)
    with pretend_cuda(2) as machine:
        check(config("gpu", *SMALL, f"weights='{scale}'"))
        assert machine.hazards == []
    (folder,) = (tmp_path / "results" / "gpu").iterdir()
    record = json.loads((folder / "summary.json").read_text())
    assert [part["error"] for part in record["parts"].values()] == [None] * len(gpu.PARTS)
    for one in record["parts"]["Machine"]["checks"] + record["parts"]["Lossless"]["checks"]:
        assert one["met"] is not False
    of_runs = record["parts"]["Full size"]["checks"]
    names = {one["name"].rpartition(":")[0] for one in of_runs}
    # The planner predicts by hidden states, which follow no trace.
    assert len(names) == 3 + 2, [one["name"] for one in of_runs]
    assert all(one["met"] for one in of_runs if one["name"].endswith("budget"))
    with tarfile.open(folder / "runs.tar.xz") as archive:
        packed = [one for one in archive.getnames() if one.endswith("-simulated/run.json")]
    assert len(packed) == len(names)


def test_a_part_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(bench: Bench) -> list[Check]:
        raise RuntimeError("out of [memory]")

    def falls_short(bench: Bench) -> list[Check]:
        return [measured("one", 1.0, at_least=1), measured("rate", 0.5, at_least=1)]

    bench: Any = None
    with pretend_cuda(1):
        parts = run_parts(bench, Console(quiet=True), {"first": fails, "second": falls_short})
    lines = summary(parts)
    assert lines == ["FAIL  first: RuntimeError: out of [memory]", "FAIL  second: rate"]


def test_without_cuda_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ended = run_module("experiments.bench.gpu", f"output={tmp_path}")
    assert refusal(ended).startswith("error: testbed=local needs 1 CUDA device")
    assert ended.stdout == ""
    assert not list(tmp_path.iterdir())
