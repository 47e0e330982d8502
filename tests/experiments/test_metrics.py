"""TTFT, TPOT, ITL and E2EL as vLLM's serving benchmark defines them, and their statistics."""

from __future__ import annotations

import pytest

from experiments.metrics import AccessCounter, distribution, latency_summary, request_table
from experiments.serving import Served
from experiments.workloads import Request
from finemoe.offload.policy import Iteration, LayerOutcome


def served(times: tuple[float, ...], iterations: range) -> Served:
    tokens = tuple(range(len(times)))
    return Served(Request(7, (1, 2, 3), len(times)), 0, tokens, times, iterations)


def test_latencies_of_one_request() -> None:
    one = served((0.5, 0.6, 0.9), range(3))
    assert one.ttft == 0.5
    assert one.e2el == 0.9
    assert one.tpot == pytest.approx(0.2)
    assert one.itl == pytest.approx((0.1, 0.3))


def test_a_single_token_has_no_tpot() -> None:
    assert served((0.5,), range(1)).tpot is None
    assert latency_summary([served((0.5,), range(1))], seed=0)["tpot_s"] is None


def test_distribution() -> None:
    values = distribution([1.0, 2.0, 3.0, 10.0], seed=0)
    assert values is not None
    assert values["mean"] == 4.0
    assert values["p50"] == 2.5
    low, high = values["ci95"]
    assert 1.0 <= low < 4.0 < high <= 10.0
    assert distribution([1.0, 2.0, 3.0, 10.0], seed=0) == values


def test_accesses_are_counted_by_phase_and_request() -> None:
    counter = AccessCounter()
    prefill = Iteration(4, "prefill", (7,), (3,))
    decode = Iteration(5, "decode", (7,), (1,))
    counter(LayerOutcome(prefill, 0, hits=(0,), late=(), misses=(1, 2)))
    counter(LayerOutcome(prefill, 1, hits=(), late=(3,), misses=()))
    counter(LayerOutcome(decode, 0, hits=(0, 1), late=(), misses=()))
    summary = counter.summary()
    assert (summary["hits"], summary["late"], summary["misses"]) == (3, 1, 2)
    assert summary["expert_hit_rate"] == 0.5
    assert summary["phases"]["prefill"]["expert_hit_rate"] == 0.25
    assert summary["phases"]["decode"]["expert_hit_rate"] == 1.0
    row = request_table([served((0.1, 0.2), range(4, 6))], counter).iloc[0]
    assert (row["hits"], row["late"], row["misses"]) == (3, 1, 2)
