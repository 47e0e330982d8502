from __future__ import annotations

import pytest

from experiments import replay_bench
from experiments.errors import UserError
from experiments.replay_bench import CHOICES, ReplaySpeed, configs, cpu_seconds


def test_speed_is_layer_steps_over_the_seconds_of_the_replay_alone() -> None:
    speed = ReplaySpeed("mixtral", "finemoe", 8_000, teach_s=9.0, measure_s=0.5, bound_s=9.0)
    assert speed.layer_steps_per_s == 16_000


def test_every_system_is_measured_on_every_model() -> None:
    found = [(cfg.model.name, cfg.system.label) for cfg in configs(CHOICES, ["output=unused"])]
    assert len(found) == len(set(found)) == 16
    assert ("qwen", "belady") in found


def test_what_no_config_has_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nonesuch"):
        configs({**CHOICES, "systems": "nonesuch"}, [])
    with pytest.raises(SystemExit) as stop:
        replay_bench.main(["systems=nonesuch"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_cpu_seconds_count_work() -> None:
    assert cpu_seconds(lambda: sum(range(300_000))) > cpu_seconds(lambda: None)
