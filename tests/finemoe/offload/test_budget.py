"""From memory budgets to slots."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.budget import BudgetError, parse_budget, plan_slots
from finemoe.offload.policy import ModelShape

MIXTRAL = ModelShape(layers=32, experts=8, top_k=2, hidden_size=4096)
MIXTRAL_EXPERT = 3 * 4096 * 14336 * 2
QWEN = ModelShape(layers=24, experts=60, top_k=4, hidden_size=2048)
QWEN_EXPERT = 3 * 2048 * 1408 * 2


@pytest.mark.parametrize("budget", [6, 6.0, "6", " 6.0 ", "6GB", "6 gb", "6000MB"])
def test_a_number_means_decimal_gigabytes(budget: float | str) -> None:
    assert parse_budget(budget, MIXTRAL_EXPERT, MIXTRAL) == 6_000_000_000
    assert parse_budget("1GiB", MIXTRAL_EXPERT, MIXTRAL) == 2**30


@pytest.mark.parametrize(
    ("budget", "devices", "expected"),
    # 6e9 / 352_321_536 = 17.03; 12e9 gives 34.06; 25 % of 32 * 8 experts is 64.
    [
        (6, 1, (17,)),
        (12, 1, (34,)),
        ("25%", 1, (64,)),
        ("12.5 %", 1, (32,)),
        (96, 1, (256,)),
        (1000, 1, (256,)),
        (6, 3, (6, 6, 5)),
        ("100%", 6, (43, 43, 43, 43, 42, 42)),
    ],
)
def test_slots_of_mixtral(budget: float | str, devices: int, expected: tuple[int, ...]) -> None:
    parsed = parse_budget(budget, MIXTRAL_EXPERT, MIXTRAL)
    assert plan_slots(parsed, MIXTRAL_EXPERT, MIXTRAL, devices) == expected


@settings(max_examples=60)
@given(
    budget=st.integers(0, 3000 * QWEN_EXPERT),
    devices=st.integers(1, 7),
    shape=st.sampled_from([QWEN, ModelShape(2, 3, 2, 8), ModelShape(3, 7, 1, 8)]),
)
def test_slots_fit_budget_and_experts(budget: int, devices: int, shape: ModelShape) -> None:
    try:
        planned = plan_slots(budget, QWEN_EXPERT, shape, devices)
    except BudgetError as error:
        named = re.search(r"at least (\S+) GB", str(error))
        assert named is not None
        enough = parse_budget(named[1], QWEN_EXPERT, shape)
        assert budget < enough
        assert plan_slots(enough, QWEN_EXPERT, shape, devices)
        return
    experts = [0] * devices
    for expert in range(shape.layers * shape.experts):
        experts[expert % devices] += 1
    assert sum(planned) * QWEN_EXPERT <= budget
    assert all(count <= held for count, held in zip(planned, experts, strict=True))
    if sum(planned) < sum(experts):
        assert sum(planned) == budget // QWEN_EXPERT
        assert max(planned) - min(planned) <= 1
    else:
        assert list(planned) == experts
