"""TTFT, TPOT, ITL and E2EL as vLLM's serving benchmark defines them, and their statistics."""

from __future__ import annotations

import pytest

from experiments.run.metrics import AccessCounter, latency_summary, request_table
from experiments.run.schedule import Request, Served
from finemoe.offload.policy import Iteration, LayerOutcome, Phase


def served(times: tuple[float, ...], iterations: range, number: int = 7) -> Served:
    tokens = tuple(range(len(times)))
    return Served(Request(number, (1, 2, 3), len(times)), number, tokens, times, tuple(iterations))


def counter(iterations: int) -> AccessCounter:
    return AccessCounter(dict.fromkeys(range(iterations), (0, 0, 0)))


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


def unions(
    iterations: list[tuple[Phase, list[dict[int, str]]]], slots: int
) -> dict[str, dict[str, float] | None]:
    """Count layer by layer, each expert found in one of three ways, and return the summary's."""
    counter = AccessCounter()
    for number, (phase, layers) in enumerate(iterations):
        iteration = Iteration(number, phase, (7,), (1,))
        for layer, found in enumerate(layers):
            kinds = [tuple(j for j in sorted(found) if found[j] == kind) for kind in "hlm"]
            counter(LayerOutcome(iteration, layer, *kinds))
    phases = counter.summary(slots, len(iterations[0][1]) if iterations else 1)["phases"]
    return {name: facts["union_over_capacity"] for name, facts in phases.items()}


def test_the_union_of_a_step_over_a_layers_share_of_the_cache() -> None:
    """Two layers share 4 slots. A prefill activates 3 and 1 experts, decodes 2 and 2, 1 and 2."""
    prefill, decode = [{0: "h", 1: "l", 5: "m"}, {3: "m"}], [{0: "h", 1: "h"}, {3: "l", 4: "m"}]
    found = unions([("prefill", prefill), ("decode", decode), ("decode", [{9: "m"}, decode[1]])], 4)
    assert found == {"prefill": {"mean": 1.0, "max": 1.5}, "decode": {"mean": 0.875, "max": 1.0}}
    assert unions([("decode", decode)], 2)["decode"] == {"mean": 2.0, "max": 2.0}
    assert unions([], 0) == {"prefill": None, "decode": None}
