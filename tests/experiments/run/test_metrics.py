"""TTFT, TPOT, ITL and E2EL as vLLM's serving benchmark defines them, and their statistics."""

from __future__ import annotations

import pytest

from experiments.run.metrics import NONE, AccessCounter, latency_summary, request_table
from experiments.run.schedule import Request, Served
from finemoe.offload.policy import Iteration, LayerOutcome, Phase


def served(times: tuple[float, ...], iterations: range, number: int = 7) -> Served:
    tokens = tuple(range(len(times)))
    return Served(Request(number, (1, 2, 3), len(times)), number, tokens, times, tuple(iterations))


def counter(iterations: int) -> AccessCounter:
    return AccessCounter(dict.fromkeys(range(iterations), NONE))


def test_latencies_of_one_request() -> None:
    one = served((0.5, 0.6, 0.9), range(3))
    assert one.ttft == 0.5
    assert one.e2el == 0.9
    assert one.tpot == pytest.approx(0.2)
    assert one.itl == pytest.approx((0.1, 0.3))


def test_a_single_token_has_no_tpot() -> None:
    requests = request_table([served((0.5,), range(1))], counter(1))
    summary = latency_summary(requests, "docs")
    assert summary["tpot_s"] is summary["itl_s"] is summary["queueing_s"] is None
    assert summary["ttft_s"] == {"mean": 0.5, "p50": 0.5, "p95": 0.5, "p99": 0.5, "ci95": None}


def test_accesses_are_counted_by_phase_and_request() -> None:
    counter = AccessCounter()
    prefill = Iteration(4, "prefill", (7,), (3,))
    decode = Iteration(5, "decode", (7,), (1,))
    counter(LayerOutcome(prefill, 0, hits=(0,), late=(), misses=(1, 2)))
    counter(LayerOutcome(prefill, 1, hits=(), late=(3,), misses=()))
    counter(LayerOutcome(decode, 0, hits=(0, 1), late=(), misses=()))
    summary = counter.summary(slots=4, layers=2)
    assert (summary["hits"], summary["late"], summary["misses"]) == (3, 1, 2)
    assert summary["expert_hit_rate"] == 0.5
    assert summary["phases"]["prefill"]["expert_hit_rate"] == 0.25
    assert summary["phases"]["decode"]["expert_hit_rate"] == 1.0
    row = request_table([served((0.1, 0.2), range(4, 6))], counter).iloc[0]
    assert (row["hits"], row["late"], row["misses"]) == (3, 1, 2)


def test_the_union_of_a_step_over_a_layers_share_of_the_cache() -> None:
    """Two layers share 4 slots. A prefill activates 3 and 1 experts, decodes 2 and 2, 1 and 2."""
    counter = AccessCounter()
    steps: list[tuple[Phase, tuple[int, ...], tuple[int, ...]]] = [
        *(("prefill", (0, 1, 5), (3,)), ("decode", (0, 1), (3, 4)), ("decode", (9,), (3, 4))),
    ]
    for number, (phase, *layers) in enumerate(steps):
        iteration = Iteration(number, phase, (7,), (1,))
        for layer, activated in enumerate(layers):
            counter(LayerOutcome(iteration, layer, activated[:1], activated[1:2], activated[2:]))
    phases = counter.summary(slots=4, layers=2)["phases"]
    found = {name: facts["union_over_capacity"] for name, facts in phases.items()}
    assert found == {"prefill": {"mean": 1.0, "max": 1.5}, "decode": {"mean": 0.875, "max": 1.0}}
