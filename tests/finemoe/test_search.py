"""Semantic and trajectory search: cases by hand, and equality with the plain cosine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.expert_map import ExpertMapStore, TrajectorySearch, nearest
from finemoe.offload.policy import FloatArray, ModelShape
from tests.finemoe.offload.states import array


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
