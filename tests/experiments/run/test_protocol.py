"""Latencies as vLLM's serving benchmark defines them, accesses, and where results go."""

import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.run.console import Console, shown
from experiments.run.protocol import (
    access_summary,
    access_table,
    accesses_of,
    latency_summary,
    request_table,
)
from experiments.run.records import is_logged, log_record, write_record
from experiments.run.schedule import Request, Served
from finemoe.offload.policy import Iteration, LayerOutcome, Phase


def served(times: tuple[float, ...], iterations: range, number: int = 7) -> Served:
    request, tokens = Request(number, (1, 2, 3), len(times)), tuple(range(len(times)))
    return Served(request, number, 0.0, 0.0, tokens, list(times), list(iterations))


def test_latencies_of_one_request() -> None:
    one = served((0.5, 0.6, 0.9), range(3))
    assert one.ttft == 0.5
    assert one.e2el == 0.9
    assert one.tpot == pytest.approx(0.2)
    assert one.itl == pytest.approx((0.1, 0.3))


def test_a_single_token_has_no_tpot() -> None:
    requests = request_table([served((0.5,), range(1))], access_table([]))
    summary = latency_summary(requests, "docs")
    assert summary["tpot_s"] is summary["itl_s"] is summary["queueing_s"] is None
    assert summary["ttft_s"] == {"mean": 0.5, "p50": 0.5, "p95": 0.5, "p99": 0.5, "ci95": None}


def test_accesses_are_counted_by_phase_and_request() -> None:
    prefill = Iteration(4, "prefill", (7,), (3,))
    decode = Iteration(5, "decode", (7,), (1,))
    outcomes = [
        LayerOutcome(prefill, 0, hits=(0,), late=(), misses=(1, 2)),
        LayerOutcome(prefill, 1, hits=(), late=(3,), misses=()),
        LayerOutcome(decode, 0, hits=(0, 1), late=(), misses=()),
    ]
    table = access_table([*map(accesses_of, outcomes)])
    summary = access_summary(table, slots=4, layers=2)
    assert (summary["hits"], summary["late"], summary["misses"]) == (3, 1, 2)
    assert summary["expert_hit_rate"] == 0.5
    assert summary["phases"]["prefill"]["expert_hit_rate"] == 0.25
    assert summary["phases"]["decode"]["expert_hit_rate"] == 1.0
    row = request_table(
        [served((0.1, 0.2), range(4, 6))], access_table([*map(accesses_of, outcomes)])
    ).iloc[0]
    assert (row["hits"], row["late"], row["misses"]) == (3, 1, 2)


def test_the_union_of_a_step_over_a_layers_share_of_the_cache() -> None:
    """Two layers share 4 slots. A prefill activates 3 and 1 experts, decodes 2 and 2, 1 and 2."""
    steps: list[tuple[Phase, tuple[int, ...], tuple[int, ...]]] = [
        *(("prefill", (0, 1, 5), (3,)), ("decode", (0, 1), (3, 4)), ("decode", (9,), (3, 4)))
    ]
    outcomes = [
        LayerOutcome(Iteration(number, phase, (7,), (1,)), layer, of[:1], of[1:2], of[2:])
        for number, (phase, *layers) in enumerate(steps)
        for layer, of in enumerate(layers)
    ]
    phases = access_summary(access_table([*map(accesses_of, outcomes)]), slots=4, layers=2)[
        "phases"
    ]
    found = {name: facts["union_over_capacity"] for name, facts in phases.items()}
    assert found == {"prefill": {"mean": 1.0, "max": 1.5}, "decode": {"mean": 0.875, "max": 1.0}}


def test_what_wandb_refuses_is_logged_later(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for name, value in {"SILENT": "true", "MODE": "online", "API_KEY": "no key"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    record = {
        **{"system": "finemoe", "model": "mixtral", "memory_budget_gb": 6.0, "mode": "simulated"},
        **{"weights": "scale", "config": {}, "summary": {"hits": 1}},
    }
    requests = pd.DataFrame({"ttft_s": [0.1], "itl_s": [[0.1]], "tokens": [[1, 2]]})
    path = write_record(tmp_path, record, requests)
    log_record("finemoe", tmp_path, record)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{path} is kept" in said
    assert not is_logged(path)
    # The next start.
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_record("finemoe", tmp_path, record)
    assert is_logged(path)
    # Done again, it is to be logged again.
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert not is_logged(path)


def test_no_terminal_obeys_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Console().announce(["[bold]a[/b] \\[red] \x1b[2J\x1b]0;title\x07 \x9b1m \r\u202eb\ud800"])
    printed = capsys.readouterr().out
    assert printed.startswith("[bold]a[/b] \\[red] \N{REPLACEMENT CHARACTER}[2J")
    assert not set("\x1b\x07\x9b\r\u202e\ud800") & set(printed)
    assert shown("plain").plain == "plain"
