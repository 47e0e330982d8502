"""Simulated runs through the command line: any machine, twice the same, honest about their mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finemoe.offload.policy import ModelShape
from finemoe.trace import TraceReader
from tests.command import SMALL, record_of, run_command

LIVE = tuple(SMALL)
REPLAY = tuple(one for one in SMALL if not one.startswith("testbed"))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A live run that left its routing and its timeline."""
    folder = tmp_path_factory.mktemp("live")
    asked = ("system=on_demand", "memory_budget=6", "record=true", "timeline=true")
    done = run_command(*LIVE, *asked, f"output={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def replay(folder: Path, trace: Path, *overrides: str) -> dict[str, Any]:
    place = (f"routing={trace}", "testbed=rtx3090x6", "memory_budget=6", f"output={folder}")
    done = run_command(*REPLAY, *place, *overrides)
    assert done.returncode == 0, done.stderr
    return record_of(folder)


def test_a_live_run_leaves_its_routing_and_a_timeline(live: Path) -> None:
    trace = TraceReader(live / "trace.parquet")
    trace.require(
        ("logits", "embeddings", "hidden_states"), gates=True, shape=ModelShape(32, 8, 2, 64)
    )
    assert len(trace) == 4
    tracks = {e["cat"] for e in json.loads((live / "timeline.json").read_text())["traceEvents"]
              if e["ph"] == "X"}  # fmt: skip
    assert {"iterations", "device 0", "link 0", "on_demand_wait"} <= tracks


def test_on_demand_misses_the_same_experts_live_and_replayed(live: Path, tmp_path: Path) -> None:
    replayed = replay(tmp_path, live / "trace.parquet", "system=on_demand", "testbed.devices=1")
    ours, theirs = replayed["summary"], record_of(live)["summary"]
    for name in ("hits", "late", "misses", "bytes_on_demand", "bytes_prefetched"):
        assert ours[name] == theirs[name]
    # The union of a step over a layer's share of the cache is among them.
    assert ours["phases"] == theirs["phases"]
    assert ours["phases"]["decode"]["union_over_capacity"]["max"] > 0
    assert replayed["shared_prefix"] == record_of(live)["shared_prefix"]
    assert (replayed["mode"], ours["lossless"]) == ("simulated", None)
    assert ours["bound"]["times"] >= 1


def test_the_same_config_twice_gives_the_same_record(live: Path, tmp_path: Path) -> None:
    records = []
    for name in ("one", "two"):
        record = replay(tmp_path / name, live / "trace.parquet", "system=finemoe")
        del record["date"], record["config"]["output"]
        records.append(json.dumps(record))
    assert records[0] == records[1]
    tables = [(tmp_path / name / "requests.parquet").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]


def test_a_foreign_table_of_activations_will_do_for_on_demand(live: Path, tmp_path: Path) -> None:
    rows = []
    for request in TraceReader(live / "trace.parquet").requests():
        for step, routed in enumerate(request.steps):
            phase = "decode" if step else "prefill"
            for layer, counts in enumerate(routed.counts):
                chosen = [j for j, count in enumerate(counts) for _ in range(count)]
                ranks = [rank % 2 for rank in range(len(chosen))]
                rows += [
                    (request.number, phase, step, layer, rank, expert, 0.5)
                    for rank, expert in zip(ranks, chosen, strict=True)
                ]
    names = ["request", "phase", "step", "layer", "rank", "expert", "weight"]
    pd.DataFrame(rows, columns=names).to_csv(tmp_path / "foreign.csv", index=False)
    asked = ("system=on_demand", "testbed.devices=1")
    own = replay(tmp_path / "own", live / "trace.parquet", *asked)
    foreign = replay(tmp_path / "foreign", tmp_path / "foreign.csv", *asked)
    assert foreign["routing"].startswith("a foreign trace, foreign.csv: maps are sparse")
    assert foreign["shared_prefix"] is None
    for name in ("hits", "late", "misses", "ttft_s", "tpot_s"):
        assert foreign["summary"][name] == own["summary"][name]
    # Sparse maps will do for FineMoE, but nothing stands for hidden states.
    asked = ("system=finemoe", "testbed.devices=1")
    assert replay(tmp_path / "maps", tmp_path / "foreign.csv", *asked)["summary"]["hits"] > 0
    done = run_command(
        *REPLAY, "system=promoe", f"routing={tmp_path / 'foreign.csv'}", "testbed=a100"
    )
    assert done.returncode == 2
    assert "hidden states" in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=qwen", "not 24 layers, 60 experts"),
        ("workload.output_tokens=9", "lower workload.output_tokens"),
        ("workload.prompts=9", "lower workload.prompts"),
        ("routing=no/such.parquet", "no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    live: Path, tmp_path: Path, override: str, said: str
) -> None:
    places = ("testbed=rtx3090x6", f"routing={live / 'trace.parquet'}", f"output={tmp_path}")
    done = run_command(*REPLAY, *places, override)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "run.json").exists()
