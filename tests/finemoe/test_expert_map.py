"""The expert map store: redundancy by hand, files, and byte counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from finemoe.expert_map import ExpertMapStore, TrajectorySearch, nearest
from finemoe.offload.policy import FloatArray, ModelShape
from tests.finemoe.offload.states import array

SHAPE = ModelShape(layers=4, experts=2, top_k=1, hidden_size=2)
MODEL = "a/model"


SAME_MEANING = array(2, 0), array((1, 0), (0, 1), (0, 1), (0, 1))
SAME_PATH = array(3, 4), array((1, 0), (1, 0), (1, 0), (1, 0))
NEW = array(1, 0), array((1, 0), (1, 0), (1, 0), (1, 0))


def disagreeing_store(distance: int) -> ExpertMapStore:
    """Hold entry 0, which means what NEW means, and entry 1, which takes the path NEW takes."""
    store = ExpertMapStore(SHAPE, 2, distance)
    for embedding, expert_map in (SAME_MEANING, SAME_PATH):
        store.add(expert_map, embedding)
    return store


def numbered_store(capacity: int, entries: int) -> ExpertMapStore:
    store = ExpertMapStore(SHAPE, capacity, 1)
    rng = np.random.default_rng(0)
    for _ in range(entries):
        expert_map = rng.random((SHAPE.layers, SHAPE.experts), dtype=np.float32)
        expert_map /= expert_map.sum(axis=1, keepdims=True)
        store.add(expert_map, rng.random(SHAPE.hidden_size, dtype=np.float32))
    return store


def saved(store: ExpertMapStore, folder: Path) -> Path:
    path = folder / "store.safetensors"
    store.save(path, MODEL)
    return path


# NEW against entry 0: score_sem = 1; score_traj = (1 + 0 + 0 + 0) / (2 * 2) = 1/4.
# NEW against entry 1: score_sem = 3/5; score_traj = 4 / (2 * 2) = 1.
@pytest.mark.parametrize(
    ("distance", "redundancy", "replaced"),
    [
        (1, (0.4375, 0.90), 1),  # 1/4 * 1 + 3/4 * 1/4; 1/4 * 3/5 + 3/4 * 1
        (2, (0.6250, 0.80), 1),  # 2/4 * 1 + 2/4 * 1/4; 2/4 * 3/5 + 2/4 * 1
        (3, (0.8125, 0.70), 0),  # 3/4 * 1 + 1/4 * 1/4; 3/4 * 3/5 + 1/4 * 1
        (4, (1.0000, 0.60), 0),  # only the semantic score is left
        (9, (1.0000, 0.60), 0),  # a distance beyond the last layer counts as L
    ],
)
def test_distance_weighs_meaning_against_path(
    distance: int, redundancy: Any, replaced: int
) -> None:
    store = disagreeing_store(distance)
    embedding, expert_map = NEW
    found = store.redundancy(expert_map[:, None], embedding[None])
    assert found == pytest.approx(array(redundancy))
    assert store.add(expert_map, embedding) == replaced


def test_a_replacement_takes_over_map_embedding_and_norms() -> None:
    store = disagreeing_store(3)
    kept = store.expert_map(1).copy()
    new_map = array((0.6, 0.8), (0, 1), (0, 1), (0, 1))
    entry = store.add(new_map, array(0, 5))
    # Against entry 0: 3/4 * 0 + 1/4 * 3.6/4 = 0.225; against 1: 3/4 * 4/5 + 1/4 * 0.6/4 = 0.6375.
    assert entry == 1
    assert not np.array_equal(store.expert_map(1), kept)
    assert store.expert_map(1) == pytest.approx(new_map)
    assert store.embeddings[:, 1] == pytest.approx((0, 1))
    assert store.prefix_norms[:, 1] == pytest.approx([1, 2**0.5, 3**0.5, 2])
    assert store.expert_map(0) == pytest.approx(SAME_MEANING[1])


@pytest.mark.parametrize("stored", [0, 3, 5])
def test_a_batch_enters_as_one_iteration_after_the_other(stored: int) -> None:
    together, one_by_one = numbered_store(5, stored), numbered_store(5, stored)
    rng = np.random.default_rng(1)
    rows = rng.random((SHAPE.layers, 7, SHAPE.experts), dtype=np.float32)
    embeddings = rng.random((7, SHAPE.hidden_size), dtype=np.float32)
    singly = [one_by_one.add(rows[:, one], embeddings[one]) for one in range(7)]
    assert together.add_all(rows, embeddings) == singly
    for name in ("maps", "embeddings", "prefix_norms"):
        assert np.array_equal(getattr(together, name), getattr(one_by_one, name))


def test_loading_adds_to_what_is_there(tmp_path: Path) -> None:
    path = saved(disagreeing_store(1), tmp_path)
    store = numbered_store(5, 1)
    before = store.expert_map(0).copy()
    store.load(path, MODEL)
    assert store.size == 3
    assert np.array_equal(store.expert_map(0), before)
    assert np.array_equal(store.expert_map(2), SAME_PATH[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("maps", lambda good: good + np.inf, "maps that are not all numbers"),
        ("maps", lambda good: good - 1, "maps whose rows are no probabilities"),
        ("maps", lambda good: good[0], r"maps as float32 of shape \(4, 2\), not"),
        ("embeddings", lambda good: good * np.float32(9), "embeddings that are longer than 1"),
    ],
)
def test_arrays_of_no_store_are_refused(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    path = saved(disagreeing_store(1), tmp_path)
    arrays = load_file(path)
    save_file({**arrays, name: change(arrays[name])}, path, metadata={"model_id": MODEL})
    store = ExpertMapStore(SHAPE, 2, 1)
    with pytest.raises(ValueError, match=message):
        store.load(path, MODEL)
    assert store.size == 0


def test_semantic_search_finds_the_largest_cosine_of_every_query() -> None:
    stored = array((2, 0), (0, 3), (1, 1))
    store = ExpertMapStore(ModelShape(1, 1, 1, 2), 3, 1)
    for embedding in stored:
        store.add(np.ones((1, 1), dtype=np.float32), embedding)
    queries = array((5, 0), (3, 4), (-1, 0.5))
    # (3, 4): 3/5 to entry 0, 4/5 to entry 1, 7 / (5 * sqrt 2) to entry 2.
    # (-1, 0.5): -2 / sqrt 5 to entry 0, 1 / sqrt 5 to entry 1, -1 / sqrt 10 to entry 2.
    found = nearest(store.cosines(queries))
    assert found.entries.tolist() == [0, 2, 1]
    assert found.scores == pytest.approx([1.0, 7 / (5 * 2**0.5), 1 / 5**0.5])


@st.composite
def searches(draw: st.DrawFn) -> tuple[FloatArray, FloatArray, int]:
    """Draw gate probabilities of stored iterations (N, L, J), of queries (B, L, J), a capacity."""
    layers, experts = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    stored, batch = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    sharpness = draw(st.sampled_from([0.1, 1.0, 8.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = sharpness * rng.standard_normal((stored + batch, layers, experts))
    weights = np.exp(logits)
    probabilities = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    return probabilities[:stored], probabilities[stored:], draw(st.integers(1, stored))


@settings(max_examples=60)
@given(searches())
def test_trajectory_search_is_a_flat_cosine(case: tuple[FloatArray, FloatArray, int]) -> None:
    maps, queries, capacity = case
    _, layers, experts = maps.shape
    store = ExpertMapStore(ModelShape(layers, experts, 1, 1), capacity, 1)
    for expert_map in maps:
        store.add(expert_map, array(1))
    kept = np.stack([store.expert_map(entry) for entry in range(store.size)])
    search = TrajectorySearch(store, len(queries))
    for layer in range(layers):
        cosines = flattened_cosines(queries[:, : layer + 1], kept[:, : layer + 1])
        (entries,), (scores,) = search.observe(queries[None, :, layer])
        for row, entry, score in zip(cosines, entries, scores, strict=True):
            assert score == pytest.approx(row.max(), abs=1e-5)
            assert row[entry] == pytest.approx(row.max(), abs=1e-5)


def flattened_cosines(queries: FloatArray, maps: FloatArray) -> FloatArray:
    a = queries.reshape(len(queries), -1).astype(np.float64)
    b = maps.reshape(len(maps), -1).astype(np.float64)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    cosines: FloatArray = a @ b.T / norms
    return cosines
