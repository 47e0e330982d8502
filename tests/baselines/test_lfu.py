"""LFRU and ClassLRU: victims against naive models of them; what decays, by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.lfu import ClassLruPolicy, LfruPolicy
from finemoe.offload.policy import ExpertId, Iteration, LayerOutcome, ModelShape, Policy

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=1)
NOBODY = ExpertId(2, 3)


def outcome(layer: int, used: tuple[int, ...], tokens: int, missed: bool = False) -> LayerOutcome:
    iteration = Iteration(0, "decode" if tokens == 1 else "prefill", (0,), (tokens,))
    kinds = ((), (), used) if missed else (used, (), ())
    return LayerOutcome(iteration, layer, *kinds)


def test_class_lru_halves_counts_after_128_tokens_and_has_eight_classes() -> None:
    policy = ClassLruPolicy(ModelShape(layers=1, experts=2, top_k=1, hidden_size=1))
    for _ in range(2):
        policy.on_outcome(outcome(0, (0,), 32))
    count = 1 + 2 ** (-32 / 128)  # 1.84, class 0
    policy.on_outcome(outcome(0, (0,), 32))
    count = 1 + count * 2 ** (-32 / 128)  # 2.55, class 1
    assert policy.eviction_keys(NOBODY, True).tolist() == [[0, 3]]
    policy.on_outcome(outcome(0, (1,), 32))
    assert policy.eviction_keys(NOBODY, True).tolist() == [[1 / 2, 0]]
    policy.on_outcome(outcome(0, (1,), 32))
    assert count * 2 ** (-64 / 128) < 2
    assert policy.eviction_keys(NOBODY, True).tolist() == [[2, 0]]
    for _ in range(1000):  # 185 uses are the most that a use per token can count
        policy.on_outcome(outcome(0, (0,), 1))
    policy.on_outcome(outcome(0, (), 1))
    assert policy.eviction_keys(NOBODY, True)[0, 0] == 1 / 2**7


class NaiveClassLru:
    """Every use with its token, and each class a list in order of last use."""

    def __init__(self) -> None:
        self.uses: dict[ExpertId, list[float]] = {}
        self.last: dict[ExpertId, int] = {}
        self.passing: set[ExpertId] = set()
        self.layers, self.tokens = 0, 0.0

    def note(self, expert: ExpertId, tokens: int, missed: bool) -> None:
        self.layers += 1
        self.tokens += tokens / SHAPE.layers
        if tokens <= 32:
            self.uses.setdefault(expert, []).append(self.tokens)
            self.passing.discard(expert)
        elif missed:
            self.passing.add(expert)
        if tokens <= 32 or missed:
            self.last[expert] = self.layers

    def victim(self, residents: list[ExpertId]) -> ExpertId:
        def oldest(some: list[ExpertId]) -> ExpertId:
            return min(some, key=lambda one: self.last.get(one, 0))

        if passing := [one for one in residents if one in self.passing]:
            return oldest(passing)
        lists: dict[int, list[ExpertId]] = {}
        for one in residents:
            count = sum(0.5 ** ((self.tokens - use) / 128) for use in self.uses.get(one, []))
            lists.setdefault(min(7, math.floor(math.log2(max(count, 1)))), []).append(one)
        tails = {oldest(some): 2**kind for kind, some in lists.items()}
        return max(tails, key=lambda one: (self.layers - self.last.get(one, 0)) / tails[one])


class NaiveLfru:
    """Every use with the layer it was in."""

    def __init__(self) -> None:
        self.uses: dict[ExpertId, list[int]] = {}
        self.layers = 0

    def note(self, expert: ExpertId, tokens: int, missed: bool) -> None:
        self.layers += 1
        self.uses.setdefault(expert, []).append(self.layers)

    def victim(self, residents: list[ExpertId]) -> ExpertId:
        def score(one: ExpertId) -> float:
            uses = self.uses.get(one, [])
            return len(uses) / (self.layers - (uses[-1] if uses else 0) + 1)

        return min(residents, key=score)


events = st.lists(
    st.tuples(
        st.builds(ExpertId, st.integers(0, 2), st.integers(0, 3)),
        st.sampled_from([1, 1, 1, 7, 32, 33, 200]),
    ),
    min_size=8,
    max_size=80,
)


@pytest.mark.parametrize(
    ("policy", "model"), [(LfruPolicy(SHAPE), NaiveLfru), (ClassLruPolicy(SHAPE), NaiveClassLru)]
)
@given(happened=events)
def test_victims_are_a_naive_models(policy: Policy, model: Any, happened: list[Any]) -> None:
    policy.begin_serving()
    naive = model()
    residents: list[ExpertId] = []
    for expert, tokens in happened:
        missed = expert not in residents
        policy.on_outcome(outcome(expert.layer, (expert.index,), tokens, missed))
        naive.note(expert, tokens, missed)
        if not missed:
            continue
        if len(residents) == 4:
            keys = policy.eviction_keys(expert, True)
            victim = naive.victim(residents)
            # Of equal keys either may go; the engine takes the first.
            assert keys[victim] == pytest.approx(max(keys[one] for one in residents))
            residents.remove(victim)
        residents.append(expert)
