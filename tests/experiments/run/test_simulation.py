"""Simulated runs through the command line: any machine, twice the same, honest about their mode."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.reproduce.sweeps import digest
from finemoe.offload.policy import ModelShape
from finemoe.trace import TraceReader
from tests.command import SMALL, carried_out, config, record_of, refusal, run_command, unlike

REPLAY = unlike("testbed")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A live run that left its routing and its timeline."""
    folder = tmp_path_factory.mktemp("live")
    asked = ("system=on_demand", "memory_budget=6", "record=true", "timeline=true")
    carried_out(*SMALL, *asked, f"output={folder}")
    return folder


def replay(folder: Path, trace: Path, *overrides: str) -> dict[str, Any]:
    place = (f"routing={trace}", "testbed=rtx3090x6", "memory_budget=6", f"output={folder}")
    carried_out(*REPLAY, *place, *overrides)
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


def test_a_policy_is_told_what_links_share(live: Path, tmp_path: Path) -> None:
    # Six links of 75 GB/s ask for 2.7 times what the host's memory gives.
    def ttft(threshold: float, *overrides: str) -> Any:
        words = "system=planner", f"system.threshold={threshold}", *overrides
        folder = tmp_path / f"{threshold}-{len(overrides)}"
        return replay(folder, live / "trace.parquet", *words)["summary"]["ttft_s"]["mean"]

    assert ttft(0.1, "testbed.link.gb_s=96") == ttft(0.6, "testbed.link.gb_s=96")
    assert ttft(0.1) != ttft(0.6)


@pytest.fixture(scope="module")
def foreign(live: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The live run's routing as a table of activations."""
    rows = []
    for request in TraceReader(live / "trace.parquet").requests():
        for step, routed in enumerate(request.steps):
            phase = "decode" if step else "prefill"
            for layer, counts in enumerate(routed.counts):
                chosen = [j for j, count in enumerate(counts) for _ in range(count)]
                rows += [
                    (request.number, phase, step, layer, place % 2, expert, 0.5)
                    for place, expert in enumerate(chosen)
                ]
    names = ["request", "phase", "step", "layer", "rank", "expert", "weight"]
    path = tmp_path_factory.mktemp("foreign") / "foreign.csv"
    pd.DataFrame(rows, columns=names).to_csv(path, index=False)
    return path


def test_a_foreign_table_of_activations_will_do(live: Path, foreign: Path, tmp_path: Path) -> None:
    asked = ("system=on_demand", "testbed.devices=1")
    own = replay(tmp_path / "own", live / "trace.parquet", *asked)
    same = replay(tmp_path / "foreign", foreign, *asked)
    assert same["routing"].startswith("a foreign trace, foreign.csv: maps are sparse")
    assert same["shared_prefix"] is None
    for name in ("hits", "late", "misses", "ttft_s", "tpot_s"):
        assert same["summary"][name] == own["summary"][name]
    # Sparse maps will do for FineMoE.
    asked = ("system=finemoe", "testbed.devices=1")
    assert replay(tmp_path / "maps", foreign, *asked)["summary"]["hits"] > 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=qwen", "not 24 layers, 60 experts"),
        ("workload.output_tokens=9", "lower workload.output_tokens"),
        ("system=promoe", "hidden states"),
    ],
)
def test_refusals(live: Path, foreign: Path, tmp_path: Path, override: str, said: str) -> None:
    trace = foreign if "promoe" in override else live / "trace.parquet"
    places = ("testbed=rtx3090x6", f"routing={trace}", f"output={tmp_path}")
    assert said in refusal(run_command(*REPLAY, *places, override))
    assert not (tmp_path / "run.json").exists()


def test_the_host_computes_what_its_testbed_lets_it(live: Path, tmp_path: Path) -> None:
    trace = live / "trace.parquet"
    plain = replay(tmp_path / "plain", trace, "system=on_demand")["summary"]
    hosted = replay(tmp_path / "hosted", trace, "system=fiddler")["summary"]
    kinds = ("hits", "late", "misses", "host")
    assert sum(hosted[kind] for kind in kinds) == sum(plain[kind] for kind in kinds)
    assert hosted["host"] > plain["host"] == plain["bytes_not_copied"] == 0
    place = (f"routing={trace}", "testbed=rtx3090x6", "memory_budget=6", "testbed.host=null")
    done = run_command(*REPLAY, *place, "system=fiddler", f"output={tmp_path / 'refused'}")
    assert "nobody says how fast the host computes; give" in refusal(done)


@pytest.mark.parametrize(("system", "matters"), [("finemoe", False), ("hybrimoe", True)])
def test_a_testbeds_host_is_part_of_the_runs_that_use_it(system: str, matters: bool) -> None:
    words = (f"system={system}", "testbed=rtx3090x6", "output=unset")
    told, other = (config("config", *words, f"testbed.host.kernel_us={us}") for us in (10.0, 1.0))
    assert (digest(told) != digest(other)) == matters
