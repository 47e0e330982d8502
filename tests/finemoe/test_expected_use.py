"""Eviction keys that are updated in place, against the same ones computed anew."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.policy import FloatArray, Iteration, LayerOutcome, ModelShape
from finemoe.policy import ExpectedUse

LAYERS, EXPERTS = 3, 4
SHAPE = ModelShape(LAYERS, EXPERTS, top_k=1, hidden_size=2)
DECODE = Iteration(0, "decode", (0,), (1,))


def anew(expected: FloatArray, visits: FloatArray) -> list[list[float]]:
    """Return 1 / (p * freq), an expert counting as visited once before its first visit."""
    frequency = np.maximum(visits, 1.0).astype(np.float64)
    keys: list[list[float]] = (1 / (np.maximum(expected, 1e-9) * frequency)).tolist()
    return keys


def drawn(rng: np.random.Generator, layers: int) -> FloatArray:
    """Return probabilities that fill rows, some of them 0, shape (layers, J)."""
    rows = rng.dirichlet(np.full(EXPERTS, 0.3), layers)
    return np.where(rows < 0.05, 0, rows).astype(np.float32)


events = st.lists(
    st.tuples(st.sampled_from(["expect", "anything", "outcome", "keys"]), st.integers(0, 2)),
    max_size=20,
)


@settings(max_examples=60)
@given(events, st.integers(0, 2**32 - 1))
def test_keys_in_place_are_those_computed_anew(events: list[tuple[str, int]], seed: int) -> None:
    rng, use = np.random.default_rng(seed), ExpectedUse(SHAPE)
    expected = np.full((LAYERS, EXPERTS), 1 / EXPERTS, dtype=np.float32)
    visits = np.zeros((LAYERS, EXPERTS), dtype=np.float32)
    for event, layer in events:
        if event == "expect":
            expected[layer:] = drawn(rng, LAYERS - layer)
            use.expect(expected[layer:], layer)
        elif event == "anything":
            expected[:] = 1 / EXPERTS
            use.expect_anything()
        elif event == "outcome":
            hits, late, misses = (tuple(rng.permutation(EXPERTS)[:n].tolist()) for n in (2, 0, 1))
            use.on_outcome(LayerOutcome(DECODE, layer, hits, late, misses))
            np.add.at(visits[layer], [*hits, *late, *misses], 1)
        else:
            assert use.keys().tolist() == anew(expected, visits)
    assert use.keys().tolist() == anew(expected, visits)
