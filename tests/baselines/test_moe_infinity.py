"""MoE-Infinity: matrices of requests, the nearest one, what it ranks, what leaves the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from baselines.moe_infinity import (
    MatrixCollection,
    MoEInfinityPolicy,
    RunningRequest,
    moe_infinity,
)
from finemoe.offload.policy import ExpertId, Gate, Iteration, LayerOutcome, ModelShape
from tests.finemoe.offload.states import asked, decode

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=2)
FIRST = np.array([[2, 0, 0, 0], [0, 2, 0, 0], [3, 1, 0, 0]], np.float32)
SECOND = np.array([[0, 0, 2, 0], [0, 0, 2, 0], [0, 0, 1, 1]], np.float32)
EMBEDDINGS = np.zeros((1, 2), np.float32)
Requests = dict[tuple[int, int], float]


def policy(*stored: np.ndarray, **options: Any) -> MoEInfinityPolicy:
    made = moe_infinity(SHAPE, **{"early_layers": 1, **options})
    for matrix in stored:
        made.collection.add(matrix)
    return made


def gate(layer: int, *experts: int) -> Gate:
    """Return a gate whose tokens go to these experts, one each."""
    probabilities = np.full((len(experts), 4), 0.1, np.float32)
    probabilities[range(len(experts)), experts] = 0.7
    return Gate(layer, probabilities, tuple(sorted(set(experts))), None)


def ranked(made: MoEInfinityPolicy, iteration: Iteration, spoken: Gate) -> Requests:
    made.on_outcome(LayerOutcome(iteration, spoken.layer, spoken.activated, (), ()))
    return asked(made.on_gate(iteration, spoken))


def test_a_requests_matrix_counts_the_tokens_of_all_its_iterations() -> None:
    made = policy()
    prefill = Iteration(0, "prefill", (5, 6), (3, 2))
    made.on_embeddings(prefill, np.zeros((5, 2), np.float32))
    for layer in range(3):
        made.on_gate(prefill, gate(layer, 0, 0, layer, 3, 3))
    made.on_embeddings(decode(1, 5, 6), EMBEDDINGS)
    for layer in range(3):
        made.on_gate(decode(1, 5, 6), gate(layer, 1, 2))
    made.end_request(5)
    made.end_request(6)
    expected = [
        [[3, 1, 0, 0], [2, 2, 0, 0], [2, 1, 1, 0]],
        [[0, 0, 1, 2], [0, 0, 1, 2], [0, 0, 1, 2]],
    ]
    assert made.collection.matrices.tolist() == expected


def test_the_nearest_matrix_ranks_all_later_layers() -> None:
    made = policy(SECOND, FIRST)
    found = ranked(made, decode(1, 0), gate(0, 0))
    # Ratio 1 one layer ahead of three, ratios 3/4 and 1/4 two ahead.
    expected = {(1, 1): 2 / 3, (2, 0): 3 / 4 / 3, (2, 1): 1 / 4 / 3}
    assert found == pytest.approx(expected)
    found = ranked(made, decode(1, 0), gate(1, 1))
    assert found == pytest.approx({(2, 0): 3 / 4 * 2 / 3, (2, 1): 1 / 4 * 2 / 3})
    assert ranked(made, decode(1, 0), gate(2, 0)) == {}
    near = ranked(policy(FIRST, horizon=1), decode(1, 0), gate(0, 0))
    assert near == pytest.approx({(1, 1): 2 / 3})


def test_the_code_decays_more_slowly_and_asks_for_the_rest_last() -> None:
    made = policy(FIRST, variant="code")
    found = ranked(made, decode(1, 0), gate(0, 0))
    expected = {(1, j): 1e-8 * 3 / 4 for j in range(4)}
    expected |= {(2, j): 1e-8 / 2 for j in range(4)}
    expected |= {(1, 1): 3 / 4, (2, 0): 3 / 8, (2, 1): 1 / 8}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("variant", "predicted"), [("paper", {0, 1}), ("code", {2, 3})])
def test_paper_and_code_compare_different_rows(variant: str, predicted: set[int]) -> None:
    made = policy(FIRST, SECOND, variant=variant)
    for layer, expert in enumerate((0, 1, 2)):
        ranked(made, decode(1, 0), gate(layer, expert))
    # Twice as the first matrix, once as the second, which the code alone looks at after gate 1.
    made.on_embeddings(decode(1, 0), EMBEDDINGS)
    ranked(made, decode(1, 0), gate(0, 0))
    found = ranked(made, decode(1, 0), gate(1, 1))
    likely = {index for (_, index), priority in found.items() if priority > 1e-6}
    assert likely == predicted


def test_a_batch_asks_for_what_any_request_wants() -> None:
    made = policy(FIRST, SECOND)
    found = ranked(made, decode(1, 0, 1), gate(1, 1, 2))
    share = {(2, 0): 3 / 4, (2, 1): 1 / 4, (2, 2): 1 / 2, (2, 3): 1 / 2}
    assert found == pytest.approx({e: ratio * 2 / 3 for e, ratio in share.items()})


def test_popular_experts_come_first_for_the_early_layers() -> None:
    made = policy(FIRST, 5 * SECOND, early_layers=2)
    popular = made.on_embeddings(decode(1, 0), EMBEDDINGS)
    # Layer 0: 10 of 12 tokens went to expert 2, and so in layer 1.
    assert asked(popular) == pytest.approx({(0, 2): 10 / 12 * 2 / 3, (1, 2): 10 / 12 / 3})
    assert asked(policy().on_embeddings(decode(1, 0), EMBEDDINGS)) == {}


def test_a_full_collection_replaces_the_most_similar() -> None:
    collection = MatrixCollection(SHAPE, 2, "paper")
    collection.add(FIRST)
    collection.add(SECOND)
    near_first = FIRST + np.array([[0, 1, 0, 0]], np.float32)
    assert collection.add(near_first) == 0
    assert collection.popularity.tolist() == (near_first + SECOND).tolist()


def test_a_full_collection_replaces_what_was_matched_least_while_serving() -> None:
    collection = MatrixCollection(SHAPE, 3, "code")
    collection.add(FIRST)
    collection.keep_all()
    collection.add(SECOND)
    collection.add(FIRST)
    collection.matches[:] = [0, 3, 2]
    assert collection.add(SECOND) == 2
    collection.keep_all()
    assert collection.add(FIRST) is None


counts = st.lists(st.integers(0, 3), min_size=4, max_size=4)


@given(
    stored=st.lists(st.lists(counts, min_size=3, max_size=3), min_size=1, max_size=5),
    passes=st.lists(st.lists(counts, min_size=3, max_size=3), min_size=1, max_size=3),
)
def test_carried_sums(stored: list[list[list[int]]], passes: list[list[list[int]]]) -> None:
    collection = MatrixCollection(SHAPE, 5, "paper")
    request = RunningRequest(collection)
    for matrix, passed in zip(stored, passes, strict=False):
        entry = collection.add(np.array(matrix, np.float32))
        assert entry is not None
        request.refresh(entry)
        request.begin_iteration()
        for layer, tokens in enumerate(passed):
            (sums,) = request.count(slice(layer, layer + 1), np.array([tokens], np.float32))
            similarity = collection.similarity(request.matrix)
            best = similarity[sums.argmax()]
            assert best == pytest.approx(similarity.max(), abs=1e-5)


def test_the_least_active_expert_leaves_and_front_layers_stay_longer() -> None:
    made = policy(eviction="activation")
    prefill = Iteration(0, "prefill", (0,), (4,))
    made.on_embeddings(prefill, np.zeros((4, 2), np.float32))
    ranked(made, prefill, gate(0, 0, 0, 0, 1))
    keys = made.eviction_keys(ExpertId(0, 2), True)
    assert keys[0] == pytest.approx([-0.75, -0.25, 0, 0], abs=1e-5)
    # Not yet seen: uniform, damped by 1 - l / L.
    assert keys[1] == pytest.approx([-0.25 * 2 / 3] * 4, abs=1e-5)
    assert keys[2] == pytest.approx([-0.25 / 3] * 4, abs=1e-5)


@pytest.mark.parametrize(("eviction", "first"), [("lfu", 2), ("lru", 1), ("scheduler", 1)])
def test_plain_orders_can_be_chosen(eviction: str, first: int) -> None:
    made = policy(eviction=eviction)
    for expert in (1, 1, 2):
        made.on_outcome(LayerOutcome(decode(1, 0), 2, (expert,), (), ()))
    # Expert 1 was used twice, expert 2 last.
    keys = made.eviction_keys(ExpertId(2, 0), True)
    assert max((1, 2), key=lambda expert: keys[2, expert]) == first
    made.begin_serving()
    assert (made.eviction_keys(ExpertId(2, 0), True) == 0).all()


def test_requests_enter_while_serving_only_if_it_grows() -> None:
    for growing in (True, False):
        made = policy(online_growth=growing)
        for number in (0, 1):
            made.on_embeddings(decode(1, number), EMBEDDINGS)
            ranked(made, decode(1, number), gate(0, 0))
            made.end_request(number)
            made.begin_serving()
        assert made.collection.size == (2 if growing else 1)


def test_a_saved_collection_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "matrices.safetensors"
    policy(FIRST, SECOND).collection.save(path, "this model")
    loaded = policy()
    loaded.collection.load(path, "this model")
    assert loaded.collection.matrices.tolist() == [FIRST.tolist(), SECOND.tolist()]
    assert loaded.collection.popularity.tolist() == (FIRST + SECOND).tolist()
    with pytest.raises(ValueError, match="for model_id 'this model', not 'another'"):
        policy().collection.load(path, "another")
    save_file({"matrices": -FIRST[None]}, path, metadata={"model_id": "this model"})
    with pytest.raises(ValueError, match="holds matrices"):
        policy().collection.load(path, "this model")
