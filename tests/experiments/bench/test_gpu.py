from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments.bench import gpu as gpu_check
from experiments.bench.engine import Check
from experiments.bench.gpu import PARTS, Sizes, run_parts, write_results
from experiments.run.small_models import COMMON, FAMILIES, small_model

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path: Path) -> Sizes:
    small_model("mixtral").save_pretrained(tmp_path / "scale")
    full = [(name, 1, {**COMMON, **FAMILIES[name]}) for name in ("mixtral", "qwen2_moe")]
    return Sizes(
        expert_bytes=4096,
        chunk_bytes=1024,
        copies=4,
        seconds=0.01,
        matrix=64,
        scale=tmp_path / "scale",
        new_tokens=3,
        rounds=1,
        budget_gb=6e-5,
        full_tokens=3,
        full_models=tuple(full),
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs_on_the_cpu(name: str, tiny: Sizes) -> None:
    outcome = run_parts(CPU, tiny, quiet(), {name: PARTS[name]})[name]
    assert outcome["error"] is None
    values = {check["name"]: check["value"] for check in outcome["checks"]}
    assert values
    exact = [one for one in outcome["checks"] if one["at_least"] == 1]
    assert all(check["met"] for check in exact)


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, tiny: Sizes) -> None:
    def fails(device: torch.device, sizes: Sizes) -> list[Check]:
        raise RuntimeError("out of [memory]")

    def works(device: torch.device, sizes: Sizes) -> list[Check]:
        return [Check("one", 1.0, at_least=1)]

    outcomes = run_parts(CPU, tiny, quiet(), {"first": fails, "second": works})
    assert not write_results(tmp_path, "Some GPU (80 GB)", outcomes)
    record = json.loads((tmp_path / "some-gpu-80-gb.json").read_text())
    assert record["passed"] is False
    assert record["parts"]["first"]["error"] == "RuntimeError: out of [memory]"
    assert record["parts"]["second"]["passed"] is True


def test_without_cuda_it_says_why_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([f"output={tmp_path}"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
