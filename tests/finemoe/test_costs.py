"""The roofline cost model, worked by hand, and conf/testbed."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.run.config import build, full_size
from finemoe.costs import (
    DENSE_KERNELS,
    EXPERT_KERNELS,
    FINISH_KERNELS,
    START_KERNELS,
    Accelerator,
    Processor,
    RooflineCosts,
    published_sizes,
)
from finemoe.offload.virtual_links import LinkRate
from tests.command import ROOT, config

PREDICTING = ("finemoe", "moe_infinity", "promoe", "mixtral_offload", "deepspeed", "planner")

# What is left of it, 100 GB/s and 2 TFLOPS: 10 ns a 1,000 bytes, 0.5 ns a 1,000 operations.
ROUND = Accelerator(
    **{"memory_gb_s": 200.0, "matrix_tflops": 4.0, "memory_gb": 1.0, "sync_us": 10.0},
    **{"memory_efficiency": 0.5, "matrix_efficiency": 0.5, "kernel_us": 2.0},
)
RTX_3090 = Accelerator(
    **{"memory_gb_s": 936.0, "matrix_tflops": 71.0, "memory_gb": 24.0, "sync_us": 10.0},
    **{"memory_efficiency": 0.85, "matrix_efficiency": 0.8, "kernel_us": 5.0},
)
HOST = Processor(
    **{"memory_gb_s": 10.0, "matrix_tflops": 0.02, "kernel_us": 1.0},
    **{"memory_efficiency": 0.5, "matrix_efficiency": 0.5},
)
TINY = published_sizes(
    **{"layers": 2, "experts": 10, "top_k": 2, "hidden_size": 1000, "vocab_size": 3000},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 100},
    **{"expert_intermediate_size": 500, "shared_expert_intermediate_size": 200},
)
COSTS = RooflineCosts(ROUND, TINY)


def test_an_expert_costs_its_weights_or_its_arithmetic() -> None:
    # 352.32 MB / (936 GB/s x 0.85) = 442.8 us, and 7 kernels of 5 us.
    option: Any = OmegaConf.load(ROOT / "conf" / "model" / "mixtral.yaml")
    mixtral = RooflineCosts(RTX_3090, full_size(option))
    assert mixtral.expert(1) == pytest.approx(442.8e-6 + 35e-6, rel=1e-4)
    # 1.5 million parameters: 3 MB in 30 us; 3 million operations a token, 1.5 us each.
    kernels = EXPERT_KERNELS * 2e-6
    assert COSTS.expert(20) == pytest.approx(30e-6 + kernels)
    assert COSTS.expert(200) == pytest.approx(300e-6 + kernels)


def test_a_host_costs_the_same_and_the_tokens_way() -> None:
    # 3 MB at 5 GB/s; 3 million operations a token at 10 GFLOP/s; 2,000 bytes a token each way.
    costs = RooflineCosts(ROUND, TINY, processor=HOST, link=LinkRate(1e9, latency=5e-6))
    kernels = EXPERT_KERNELS * 1e-6
    assert costs.host(1) == pytest.approx(600e-6 + kernels + 2 * (5e-6 + 2e-6))
    assert costs.host(10) == pytest.approx(3000e-6 + kernels + 2 * (5e-6 + 20e-6))
    with pytest.raises(NotImplementedError):
        COSTS.host(1)


@pytest.mark.parametrize(
    ("tokens", "contexts", "start", "dense", "finish"),
    [
        # Projections 1000 x (2 x 4 + 2 x 1) x 100 = 1 million parameters, 2 MB: 20 us. Keys and
        # values 2 x 1 x 100 x 2 B x 50 = 20 kB: 0.2 us. Shared experts 0.6 million parameters:
        # 12 us. Router 10 thousand: 0.2 us. Head 3 million: 60 us. One embedding, 2 kB: 0.02 us.
        ([1], [50], 0.02, 32.4, 60),
        # Projections 2 x 1e6 x 1000 operations: 1,000 us. Attention 4 x 4 x 100 x 500,500 pairs,
        # each token with those before it: 400.4 us. Shared experts 600 us, router 10 us. The head
        # sees one row: 60 us, as when decoding.
        ([1000], [1000], 20, 2010.4, 60),
        # A batch reads weights once, and every request's keys and values: 60 kB more of them.
        ([1, 1], [50, 150], 0.04, 33, 60),
    ],
)
def test_an_iteration_by_hand(
    tokens: list[int], contexts: list[int], start: float, dense: float, finish: float
) -> None:
    costs = COSTS.iteration(tokens, contexts)
    # Every kernel adds 2 us, every wait for a result 10.
    assert costs.start == pytest.approx((start + START_KERNELS * 2 + 10) * 1e-6)
    assert costs.dense == pytest.approx((dense + DENSE_KERNELS * 2 + 10) * 1e-6)
    assert costs.finish == pytest.approx((finish + FINISH_KERNELS * 2 + 10) * 1e-6)


# The testbeds in conf/ ----------------------------------------------------------------------------


def system(name: str) -> Any:
    return OmegaConf.load(ROOT / "conf" / "system" / f"{name}.yaml")


def test_nothing_gains_by_being_unknown() -> None:
    testbed = build(config("config", "testbed=rtx3090x6").testbed)
    known = system("promoe").prediction_us
    model = OmegaConf.load(ROOT / "conf" / "model" / "mixtral.yaml")
    model.name = "another"
    again = testbed.costs(model, system("promoe"), True)
    assert again.prediction.gate == max(calls.gate for calls in known.values()) * 1e-6
    assert again.prediction.update == 0
    assert again.prediction_source.startswith("assumed, as nobody measured promoe on another")
    newcomer = testbed.costs(model, OmegaConf.create({"label": "newcomer"}), True).prediction
    for name_of_system in PREDICTING:
        for name in ("mixtral", "qwen", "phi"):
            other = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
            there = testbed.costs(other, system(name_of_system), True)
            assert newcomer.gate >= there.prediction.gate
