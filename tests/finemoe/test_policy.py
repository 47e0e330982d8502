"""FineMoE's decisions: selection, priorities, options and eviction, by hand."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.policy import ExpertId, FloatArray, Gate, Iteration, LayerOutcome, ModelShape
from finemoe.policy import ExpectedUse, FineMoEOptions, FineMoEPolicy
from finemoe.selection import Variant, select_experts
from tests.finemoe.offload.states import DECODE, array, asked, gate

SHAPE = ModelShape(layers=4, experts=4, top_k=1, hidden_size=2)
OPTIONS = FineMoEOptions(prefetch_distance=2, aggregation="mean")
DEMO = replace(OPTIONS, variant="demo")
TAIL = 1e-6
INCOMING = ExpertId(0, 0)

LIKELY = (0.5, 0.25, 0.125, 0.125)
Requests = dict[tuple[int, int], float]


def rolled(shift: int) -> FloatArray:
    """Map whose layer l likes expert l + shift best, the next one half as much, then equals."""
    return np.stack([np.roll(array(*LIKELY), layer + shift) for layer in range(4)])


def policy_with(
    options: FineMoEOptions, *stored: tuple[FloatArray, FloatArray], shape: ModelShape = SHAPE
) -> FineMoEPolicy:
    policy = FineMoEPolicy(shape, options)
    for embedding, expert_map in stored:
        policy.store.add(expert_map, embedding)
    return policy


def outcome(layer: int, *activated: int) -> LayerOutcome:
    return LayerOutcome(DECODE, layer, activated, (), ())


# Running sums of LIKELY: 0.5, 0.75, 0.875, 1.
SELECTIONS = [
    # score, K, paper, demo
    (0.625, 1, 1, 1),  # delta 0.375 < 0.5: one expert; the demo keeps none, raised to K
    (0.5, 1, 1, 1),  # delta 0.5 is reached exactly; the demo keeps sums <= delta
    (0.375, 1, 2, 1),  # delta 0.625
    (0.25, 1, 2, 2),  # delta 0.75 is reached exactly
    (0.1875, 1, 3, 2),  # delta 0.8125
    (0.0, 1, 4, 4),  # delta 1 is reached exactly by all of them
    (-0.5, 1, 4, 4),  # delta 1.5 counts as 1
    (1.0, 1, 1, 1),  # delta 0
    (1.5, 1, 1, 1),  # delta -0.5 counts as 0
    (1.0, 2, 2, 2),  # never fewer than K
    (0.25, 3, 3, 3),
    (0.1875, 2, 3, 2),
]


@pytest.mark.parametrize(("score", "top_k", "paper", "demo"), SELECTIONS)
def test_selection_by_hand(score: float, top_k: int, paper: int, demo: int) -> None:
    shuffled = array((0.125, 0.5, 0.125, 0.25))
    descending = [1, 3, 0, 2]
    counts: dict[Variant, int] = {"paper": paper, "demo": demo}
    for variant, count in counts.items():
        chosen = select_experts(shuffled, np.array([score]), top_k, variant)
        assert np.flatnonzero(chosen).tolist() == sorted(descending[:count])


# The stored embedding is (1, 0). A query (7, 24) / 25 scores 0.28, so delta is 0.72: the paper
# takes 0.5 + 0.25, the demo stops at 0.5. Rows of rolled(0): layer l likes l, then l + 1 mod 4.
ONE = (array(1, 0), rolled(0))
QUERY = array((7, 24))
# The paper counts layers from before the first one, the demo decays over the band.
PAPER_FIRST: Requests = {(0, 0): 0.5 / 1, (0, 1): 0.25 / 1, (1, 1): 0.5 / 2, (1, 2): 0.25 / 2}
DEMO_FIRST: Requests = {
    **{(layer, index): TAIL for layer in range(2) for index in range(4)},
    **{(0, 0): TAIL + 0.5 * (1 - 0 / 3), (1, 1): TAIL + 0.5 * (1 - 1 / 3)},
}


@pytest.mark.parametrize(
    ("options", "expected"), [(OPTIONS, PAPER_FIRST), (DEMO, DEMO_FIRST)], ids=["paper", "demo"]
)
def test_priorities_from_embeddings(options: FineMoEOptions, expected: Requests) -> None:
    found = policy_with(options, ONE).on_embeddings(DECODE, QUERY)
    assert asked(found) == pytest.approx(expected)


def after_gate(policy: FineMoEPolicy, layer: int, row: object) -> Requests:
    """Observe stored rows up to `layer`, then `row` there, and return what is asked for."""
    policy.on_embeddings(DECODE, QUERY)
    for before in range(layer):
        policy.on_gate(DECODE, gate(before, policy.store.expert_map(0)[before]))
    return asked(policy.on_gate(DECODE, gate(layer, row)))


# A gate that puts all on expert 3 has cosine 0.125 / |LIKELY| = 0.125 / 0.5863 = 0.2132 with row
# 0, so delta = 0.7868 and the paper takes 0.5 + 0.25 + 0.125, the demo 0.5 + 0.25.
SURPRISE = (0, 0, 0, 1)
# The demo's band starts at the target and ends before layer 4: 1 - 0/5 and 1 - 1/5 of two layers.
DEMO_BAND: Requests = {
    **{(layer, index): TAIL for layer in (2, 3) for index in range(4)},
    **{(2, 2): TAIL + 0.5, (2, 3): TAIL + 0.25},
    **{(3, 3): TAIL + 0.5 * 0.8, (3, 0): TAIL + 0.25 * 0.8},
}
AT_DISTANCE: Requests = {(2, 2): 0.5 / 2, (2, 3): 0.25 / 2, (2, 0): 0.125 / 2}
BEYOND: Requests = {(3, 3): 0.5 / 3, (3, 0): 0.25 / 3, (3, 1): 0.125 / 3}
AFTER_GATES: dict[str, tuple[dict[str, str], int, object, Requests]] = {
    "the layer at the distance": ({}, 0, SURPRISE, AT_DISTANCE),
    "K experts of a sure gate": ({}, 1, np.roll(LIKELY, 1), {(3, 3): 0.5 / 2}),
    "no layer that does not exist": ({}, 2, SURPRISE, {}),
    "no layer that does not exist, horizon all": ({"horizon": "all"}, 3, SURPRISE, {}),
    "every layer from the distance on": ({"horizon": "all"}, 0, SURPRISE, AT_DISTANCE | BEYOND),
    "all but the layer at the distance": ({"horizon": "demo"}, 0, SURPRISE, BEYOND),
    "the demo, decaying": ({"variant": "demo", "horizon": "all"}, 0, SURPRISE, DEMO_BAND),
    "the demo, a single target": (
        *({"variant": "demo"}, 1, np.roll(LIKELY, 1)),
        {**{(3, index): TAIL for index in range(4)}, (3, 3): TAIL + 0.5},
    ),
    # The gate fits perfectly, and still the embedding's score of 0.28 selects two experts.
    "semantic search alone": ({"search": "semantic"}, 0, LIKELY, {(2, 2): 0.25, (2, 3): 0.125}),
}


@pytest.mark.parametrize("case", AFTER_GATES)
def test_a_gate_asks_for(case: str) -> None:
    options, layer, row, expected = AFTER_GATES[case]
    policy = policy_with(replace(OPTIONS, **options), ONE)  # type: ignore[arg-type]
    assert after_gate(policy, layer, row) == pytest.approx(expected)


# Entry 0 means what the query means and takes another path; entry 1 the reverse.
TWO = ((array(1, 0), rolled(1)), (array(0, 1), rolled(0)))


@pytest.mark.parametrize(
    ("search", "first_layers", "third_layer"),
    [
        ("both", {(0, 1): 0.5, (1, 2): 0.25}, {(2, 2): 0.25}),
        ("semantic", {(0, 1): 0.5, (1, 2): 0.25}, {(2, 3): 0.25}),
        ("trajectory", {}, {(2, 2): 0.25}),
    ],
)
def test_the_search_decides_who_predicts(
    search: Any, first_layers: Requests, third_layer: Requests
) -> None:
    policy = policy_with(replace(OPTIONS, search=search), *TWO)
    assert asked(policy.on_embeddings(DECODE, array((1, 0)))) == pytest.approx(first_layers)
    assert asked(policy.on_gate(DECODE, gate(0, LIKELY))) == pytest.approx(third_layer)


@pytest.mark.parametrize("query", [(1, 0), (7, 24), (0, 1)])
def test_top_k_selection_ignores_the_score(query: tuple[float, float]) -> None:
    shape = replace(SHAPE, top_k=2)
    policy = policy_with(replace(OPTIONS, selection="top_k"), ONE, shape=shape)
    found = asked(policy.on_embeddings(DECODE, array(query)))
    assert found == pytest.approx({(0, 0): 0.5, (0, 1): 0.25, (1, 1): 0.25, (1, 2): 0.125})


PREFILL = Iteration(0, "prefill", (7, 8), (2, 1))
TOKENS = array((2, 0), (0, 2), (0, 3))
ROWS = array((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))


def serve(
    policy: FineMoEPolicy, iteration: Iteration, tokens: FloatArray, rows: FloatArray
) -> None:
    policy.on_embeddings(iteration, tokens)
    for layer in range(policy.shape.layers):
        policy.on_gate(iteration, Gate(layer, np.roll(rows, layer, axis=1), (0,), None))
    policy.end_iteration(iteration)


def test_mean_aggregation_remembers_one_iteration_a_request() -> None:
    policy = policy_with(OPTIONS)
    serve(policy, PREFILL, TOKENS, ROWS)
    assert policy.store.size == 2
    # The mean of (2, 0) and (0, 2) is (1, 1), of unit length (0.7071, 0.7071).
    assert policy.store.embeddings.transpose() == pytest.approx(array((0.5**0.5, 0.5**0.5), (0, 1)))
    assert policy.store.maps[0].transpose() == pytest.approx(array((0.5, 0.5, 0, 0), (0, 0, 1, 0)))
    assert policy.store.maps[3].transpose() == pytest.approx(array((0.5, 0, 0, 0.5), (0, 1, 0, 0)))


@pytest.mark.parametrize("aggregation", ["token", "demo"])
def test_tokens_are_remembered_one_by_one(aggregation: Literal["token", "demo"]) -> None:
    policy = policy_with(replace(OPTIONS, aggregation=aggregation))
    serve(policy, PREFILL, TOKENS, ROWS)
    assert policy.store.counts() == {"entries": 3, "of_prompts": 3}
    assert policy.store.embeddings.transpose() == pytest.approx(array((1, 0), (0, 1), (0, 1)))
    for layer in range(4):
        assert np.array_equal(policy.store.maps[layer].transpose(), np.roll(ROWS, layer, axis=1))


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        # The mean embedding (1, 1) is as near to either entry, of which the first counts; the mean
        # row (1/2, 1/2, 0, 0) is nearer to entry 0 (dot product 3/8, with entry 1 5/16).
        ("mean", {(0, 0): 0.5}, {(1, 1): 0.5}),
        ("token", {(0, 0): 0.5, (0, 1): 0.5}, {(1, 1): 0.5, (1, 2): 0.5}),
        ("demo", {(0, 1): 0.5}, {(1, 2): 0.5}),
    ],
)
def test_aggregation_says_who_searches(aggregation: Any, first: Requests, second: Requests) -> None:
    stored = ((array(1, 0), rolled(0)), (array(0, 1), rolled(1)))
    options = replace(OPTIONS, prefetch_distance=1, aggregation=aggregation, selection="top_k")
    policy, prompt = policy_with(options, *stored), Iteration(0, "prefill", (7,), (2,))
    assert asked(policy.on_embeddings(prompt, TOKENS[:2])) == pytest.approx(first)
    assert asked(policy.on_gate(prompt, Gate(0, ROWS[:2], (0, 1), None))) == pytest.approx(second)


def test_the_demo_evicts_by_whole_numbers_that_start_anew() -> None:
    policy = policy_with(replace(OPTIONS, eviction="demo"), (array(1, 0), rolled(0)))
    policy.on_embeddings(DECODE, array((1, 0)))
    # p = 0.5, 0.25, 0.125, 0.125: after four uses p x freq is 2, 1, 0 and 0.
    for _ in range(4):
        policy.on_outcome(outcome(0, 0, 1, 2))
    assert policy.eviction_keys(INCOMING, True)[0].tolist() == [-2, -1, 0, 0]
    policy.on_evict(ExpertId(0, 0))
    assert policy.eviction_keys(INCOMING, True)[0].tolist() == [0, -1, 0, 0]


@pytest.mark.parametrize(("online_growth", "size"), [(True, 2), (False, 1)])
def test_only_a_store_that_grows_fills_while_serving(online_growth: bool, size: int) -> None:
    policy = policy_with(replace(OPTIONS, online_growth=online_growth))
    serve(policy, DECODE, TOKENS[:1], ROWS[:1])
    assert policy.store.counts() == {"entries": 1, "of_prompts": 0}
    policy.begin_serving()
    serve(policy, replace(DECODE, number=1), TOKENS[:1], ROWS[:1])
    assert policy.store.size == size


def test_serving_begins_without_the_visits_of_the_preparation() -> None:
    policy = policy_with(OPTIONS)
    fresh = policy.eviction_keys(INCOMING, True).copy()
    for _ in range(3):
        policy.on_outcome(outcome(1, 2))
    policy.begin_serving()
    assert np.array_equal(policy.eviction_keys(INCOMING, True), fresh)


def test_a_batch_asks_for_the_union_with_the_larger_priority() -> None:
    batch = Iteration(0, "decode", (0, 1), (1, 1))
    other = array((0, 0.25, 0.75, 0), (0, 1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1))
    policy = policy_with(OPTIONS, (array(24, 7), rolled(0)), (array(0, 1), other))
    # Query (4, -3) scores 75/125 = 0.6 with (24, 7): delta 0.4 takes one expert a layer.
    # Query (0, 1) scores 1 with (0, 1), and (1, 1) is asked for by both: 0.5 / 2 and 1 / 2.
    found = asked(policy.on_embeddings(batch, array((4, -3), (0, 1))))
    assert found == pytest.approx({(0, 0): 0.5, (0, 2): 0.75, (1, 1): 0.5})
    reverse = asked(policy.on_embeddings(batch, array((0, 1), (4, -3))))
    assert reverse == pytest.approx(found)


def test_eviction_keys_follow_the_searched_map_and_the_visits() -> None:
    policy = policy_with(OPTIONS, ONE)
    policy.on_embeddings(DECODE, QUERY)
    for _ in range(3):
        policy.on_outcome(outcome(0, 0, 3))
    policy.on_outcome(outcome(3, 1))
    keys = policy.eviction_keys(INCOMING, True)
    # Layer 0 expects (1/2, 1/4, 1/8, 1/8) and saw (3, 0, 0, 3) visits.
    assert keys[0] == pytest.approx([2 / 3, 4, 8, 8 / 3])
    # Layer 3 expects (1/4, 1/8, 1/8, 1/2) and saw (0, 1, 0, 0) visits.
    assert keys[3] == pytest.approx([4, 8, 8, 2])


def test_a_gate_revises_the_map_of_the_layers_from_its_target_on() -> None:
    policy = policy_with(OPTIONS, *TWO)
    policy.on_embeddings(DECODE, array((1, 0)))
    policy.on_gate(DECODE, gate(0, LIKELY))
    keys = policy.eviction_keys(INCOMING, True)
    for layer, expected in enumerate([rolled(1), rolled(1), rolled(0), rolled(0)]):
        assert keys[layer] == pytest.approx(1 / expected[layer])


def test_a_batch_keeps_what_any_request_expects() -> None:
    batch = Iteration(0, "decode", (0, 1), (1, 1))
    policy = policy_with(OPTIONS, *TWO)
    policy.on_embeddings(batch, array((1, 0), (0, 1)))
    # Layer 0 of the two maps: (1/8, 1/2, 1/4, 1/8) and (1/2, 1/4, 1/8, 1/8).
    assert policy.eviction_keys(INCOMING, True)[0] == pytest.approx([2, 2, 4, 8])


def anew(expected: FloatArray, visits: FloatArray) -> list[list[float]]:
    """Return 1 / (p * freq), an expert counting as visited once before its first visit."""
    frequency = np.maximum(visits, 1.0).astype(np.float64)
    keys: list[list[float]] = (1 / (np.maximum(expected, 1e-9) * frequency)).tolist()
    return keys


def drawn(rng: np.random.Generator, layers: int) -> FloatArray:
    """Return probabilities that fill rows, some of them 0, shape (layers, J)."""
    rows = rng.dirichlet(np.full(4, 0.3), layers)
    return np.where(rows < 0.05, 0, rows).astype(np.float32)


events = st.lists(
    st.tuples(st.sampled_from(["expect", "anything", "outcome", "keys"]), st.integers(0, 3)),
    max_size=20,
)


@settings(max_examples=60)
@given(events, st.integers(0, 2**32 - 1))
def test_keys_in_place_are_those_computed_anew(events: list[tuple[str, int]], seed: int) -> None:
    rng, use = np.random.default_rng(seed), ExpectedUse(SHAPE)
    expected = np.full((4, 4), 0.25, dtype=np.float32)
    visits = np.zeros((4, 4), dtype=np.float32)
    for event, layer in events:
        if event == "expect":
            expected[layer:] = drawn(rng, 4 - layer)
            use.expect(expected[layer:], layer)
        elif event == "anything":
            expected[:] = 0.25
            use.expect_anything()
        elif event == "outcome":
            hits, late, misses = (tuple(rng.permutation(4)[:n].tolist()) for n in (2, 0, 1))
            use.on_outcome(LayerOutcome(DECODE, layer, hits, late, misses))
            np.add.at(visits[layer], [*hits, *late, *misses], 1)
        else:
            assert use.keys().tolist() == anew(expected, visits)
    assert use.keys().tolist() == anew(expected, visits)
