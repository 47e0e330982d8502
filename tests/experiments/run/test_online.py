"""Online runs through the command line: nobody lost, nothing before its time, honest records."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.errors import UserError
from experiments.run.console import Console
from experiments.run.protocol import run
from tests.command import config

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.0,9,3
2023-11-16 18:17:03.1,30,1
2023-11-16 18:17:03.2,6,5
2023-11-16 18:17:03.3,12,2
"""
LENGTHS = [(9, 3), (12, 1), (6, 4), (12, 2)]
"""The rows of the trace under the caps below."""
CAPS = ("workload.max_input_tokens=12", "workload.max_output_tokens=4")
Served = tuple[dict[str, Any], pd.DataFrame]
"""A record and the table of its requests."""
SIMULATED = ("testbed=rtx3090x6", "memory_budget=24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("online")
    (path / "azure.csv").write_text(TRACE)
    return path


def arguments(folder: Path, *overrides: str) -> list[str]:
    workload = ["workload=online", "workload.requests=4", "workload.max_batch_size=2", *CAPS]
    files = [f"workload.trace={folder / 'azure.csv'}", f"traces={folder / 'traces'}"]
    return [*workload, *files, *overrides]


def served(folder: Path, name: str, *overrides: str) -> Served:
    """Serve; return the record and the table of requests."""
    output = folder / name
    output.mkdir()
    record = run(config("config", *arguments(folder, f"output={output}", *overrides)), Console())
    return record, pd.read_parquet(output / "requests.parquet").sort_values("request")


@pytest.fixture(scope="module")
def replayed(folder: Path) -> Served:
    return served(folder, "replayed", *SIMULATED)


def test_every_request_is_served_once(replayed: Served) -> None:
    record, table = replayed
    assert table["request"].tolist() == [0, 1, 2, 3]
    assert [*zip(table["input_tokens"], table["output_tokens"], strict=True)] == LENGTHS
    assert [len(tokens) for tokens in table["tokens"]] == [tokens for _, tokens in LENGTHS]
    said = record["online"]
    assert (said["requests"], said["shortened"], record["history"]) == (4, 2, "none")
    assert said["realised_rate"] == pytest.approx(3 / table["arrival_s"].max())
    assert said["served_rate"] == pytest.approx(4 / (table["arrival_s"] + table["e2el_s"]).max())
    summary = record["summary"]
    assert summary["queueing_s"]["mean"] == pytest.approx(table["queueing_s"].mean())
    assert summary["history_bytes"]["store"] > 0


def test_another_rate_replays_the_same_trace(replayed: Served, folder: Path) -> None:
    record, _ = served(folder, "slow", *SIMULATED, "system=on_demand", "workload.rate=0.001")
    assert len(list((folder / "traces").iterdir())) == 1
    assert record["summary"]["queueing_s"]["mean"] == 0
    assert record["summary"]["busy_seconds"] < 4 / record["online"]["served_rate"] / 2
    assert record["online"]["sha256"] != replayed[0]["online"]["sha256"]
    assert record["dataset_sha256"] == replayed[0]["dataset_sha256"]


def test_live_serving_is_lossless(replayed: Served, folder: Path) -> None:
    fast = ("testbed=emulated", "testbed.time_scale=0.01", "workload.rate=50")
    record, table = served(folder, "live", *fast, "memory_budget=6")
    assert record["mode"] == "emulated"
    assert record["summary"]["lossless"] is True
    assert record["dataset_sha256"] == replayed[0]["dataset_sha256"]
    assert record["summary"]["history_bytes"]["store"] > 0
    assert table["output_tokens"].tolist() == [tokens for _, tokens in LENGTHS]
    assert (table["ttft_s"] > table["queueing_s"]).all()
    assert table["queueing_s"].max() > 0


def test_other_lengths_are_refused(replayed: Served, folder: Path) -> None:
    (path,) = (folder / "traces").iterdir()
    other = ("workload.max_output_tokens=5", "system=on_demand", f"routing={path}")
    with pytest.raises(UserError, match=r"6 input and 4 output tokens.*set routing=null"):
        served(folder, "other", *SIMULATED, *other)
