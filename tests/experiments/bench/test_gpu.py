from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.bench import gpu
from experiments.bench.engine import Check
from experiments.bench.gpu import Bench, check, run_parts, summary
from tests.command import config, run_module
from tests.pretend_cuda import pretend_cuda

SMALL = (
    *("sizes.expert_mb=0.004", "sizes.copies=4", "sizes.seconds=0.001", "sizes.matrix=64"),
    *("sizes.tokens=2", "sizes.rounds=1", "weights=scale", "~models.qwen", "budgets=[12]"),
    *(f"~system@systems.{name}" for name in ("deepspeed", "mixtral_offload", "promoe")),
    "~system@systems.moe_infinity",
    *("workload.prompts=2", "workload.history_share=0.5", "workload.output_tokens=2"),
    *("workload.input_tokens=4",),
)


def test_one_call_leaves_everything_there_is_to_know_of_a_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pretend_cuda(2) as machine:
        check(config("gpu", *SMALL, f"output='{tmp_path}'"))
        assert machine.hazards == []
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "summary.json").read_text())
    assert [part["error"] for part in record["parts"].values()] == [None] * len(gpu.PARTS)
    of_runs = record["parts"]["Full size"]["checks"]
    names = {one["name"].rpartition(":")[0] for one in of_runs}
    assert len(names) == 2 * 2
    assert all(one["met"] for one in of_runs if one["name"].endswith("budget"))
    assert len(list(folder.glob("runs/*/simulated/run.json"))) == len(names)
    assert "FAIL" in capsys.readouterr().out or record["passed"]


def test_a_part_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(bench: Bench) -> list[Check]:
        raise RuntimeError("out of [memory]")

    def falls_short(bench: Bench) -> list[Check]:
        return [Check("one", 1.0, at_least=1), Check("rate", 0.5, at_least=1)]

    bench: Any = None
    with pretend_cuda(1):
        parts = run_parts(bench, Console(quiet=True), {"first": fails, "second": falls_short})
    lines = summary(parts)
    assert lines == ["FAIL  first: RuntimeError: out of [memory]", "FAIL  second: rate"]


def test_without_cuda_it_says_why_in_one_line(tmp_path: Path) -> None:
    ended = run_module("experiments.bench.gpu", f"output={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: testbed=local needs 1 CUDA device")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
