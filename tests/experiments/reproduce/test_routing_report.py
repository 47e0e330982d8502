"""The routing report: its command on a tiny model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.reproduce.routing_report import PREDICTORS, report
from tests.command import config, run_module
from tests.engine import saved_mixtral

TINY = (
    "models=[mixtral]",
    "datasets=[docs]",
    "workload.prompts=6",
    "workload.input_tokens=8",
    "workload.output_tokens=5",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 3 layers and 4 experts, top-2, in a folder."""
    return saved_mixtral(tmp_path_factory.mktemp("tiny") / "model", 3)


def composed(*overrides: str) -> DictConfig:
    return config("routing_report", *TINY, *overrides)


def test_the_command_prints_and_writes_a_report(checkpoint: Path, tmp_path: Path) -> None:
    places = (f"weights={checkpoint}", f"output={tmp_path / 'out'}", f"traces={tmp_path}")
    sizes = {"layers": 3, "experts": 4, "hidden_size": 16, "expert_intermediate_size": 16}
    facts = [f"model.mixtral.{name}={size}" for name, size in sizes.items()]
    done = run_module("experiments.reproduce.routing_report", *TINY, *places, *facts)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "routing_report.json").read_text())
    subject = record["subjects"][0]
    assert (subject["layers"], subject["experts"], subject["top_k"]) == (3, 4, 2)
    assert subject["chance"] == 0.5
    assert (subject["requests"], subject["measured_requests"]) == (6, 2)
    assert subject["entropy_nats"]["fine_counts"] == pytest.approx(np.log(2))
    rates = pd.read_csv(tmp_path / "out" / "hit_rates.csv")
    assert set(rates["distance"]) == {1, 2}
    assert rates["hit_rate"].between(0, 1).all()
    assert set(rates["predictor"]) == set(PREDICTORS)
    for kind in ("csv", "png", "pdf", "txt"):
        left = {path.stem for path in (tmp_path / "out").glob(f"*.{kind}")}
        assert left == {"load_balance", "entropy", "overlap", "hit_rates"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models=[mixtrel]", "choose some of mixtral, qwen, phi"),
        ("workload.history_share=0", "leaves no history, or none"),
        ("workload.output_tokens=2", "no decoded tokens"),
    ],
)
def test_bad_input_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        report(composed(override, f"output={tmp_path / 'out'}", f"traces={tmp_path}"))
    assert not (tmp_path / "out").exists()
