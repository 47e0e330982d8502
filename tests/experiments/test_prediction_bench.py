"""The measurement of policies' calls, through the command line and in its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import prediction_bench
from experiments.prediction_bench import main


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_bench, "CALLS", 3)
    monkeypatch.setattr(prediction_bench, "REQUESTS", 2)


def test_every_call_of_every_system_is_timed(tmp_path: Path) -> None:
    output = tmp_path / "times.json"
    main(["models=qwen", f"output={output}"])
    times = json.loads(output.read_text())["times"]
    assert [one["system"] for one in times] == [
        "finemoe", "moe_infinity", "promoe", "mixtral_offload", "deepspeed"
    ]  # fmt: skip
    assert all(one["gate"] > 0 for one in times)
    by_system = {one["system"]: one for one in times}
    # The semantic search reads every stored embedding; DeepSpeed looks nothing up.
    assert by_system["finemoe"]["embeddings"] > by_system["deepspeed"]["embeddings"]


def test_an_unknown_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["models=qwen", "systems=guesswork"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
