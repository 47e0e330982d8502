"""Balance, overlap and entropy of a toy trace of two layers and three experts, worked out by hand.

Two requests of a prompt of two tokens and two decoded ones each, top-1:

    request      prompt    decoded
    0, layer 0   0 0       0 1
    0, layer 1   2 1       2 2
    1, layer 0   2 2       1 1
    1, layer 1   0 0       0 0

A gate gives its choice 1/2 and the others 1/4.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import pearsonr

from experiments.figures.routing_analysis import (
    binned,
    consecutive_overlap,
    correlation,
    entropies,
    entropy,
    heatmaps,
    hit_rates,
    iterations,
    load_balance,
    mean_with_interval,
)
from finemoe.offload.routed import RoutedStep
from finemoe.trace import TracedRequest

EXPERTS = 3
LN2 = math.log(2)
THREE_TO_ONE = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)


def step(choices: list[list[int]]) -> RoutedStep:
    """Return a step from choices (L, T); embeddings tell the first layer's choice."""
    chosen = np.eye(EXPERTS, dtype=np.float32)[np.array(choices)]
    logits = np.log(0.25 + 0.25 * chosen)
    counts = chosen.sum(axis=1).astype(np.int32)
    return RoutedStep(chosen.shape[1], counts, logits, chosen[0], logits)


def request(number: int, *steps: list[list[int]]) -> TracedRequest:
    return TracedRequest(number, (1, 2), (3, 4), tuple(step(choices) for choices in steps))


REQUESTS = (
    request(0, [[0, 0], [2, 1]], [[0], [2]], [[1], [2]]),
    request(1, [[2, 2], [0, 0]], [[1], [0]], [[1], [0]]),
)


def test_iterations_are_laid_out_request_after_request() -> None:
    routed = iterations(REQUESTS)
    assert routed.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert routed.decode.tolist() == [False, True, True] * 2
    assert routed.counts[0].tolist() == [[2, 0, 0], [0, 1, 1]]
    np.testing.assert_allclose(routed.maps[0], [[0.5, 0.25, 0.25], [0.25, 0.375, 0.375]])
    np.testing.assert_allclose(routed.last[0], [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    assert routed.embeddings[1].tolist() == [1, 0, 0]


def test_nothing_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="no recorded request"):
        iterations([])
    bare = RoutedStep(1, np.ones((2, 3), int), None, None, None)
    with pytest.raises(ValueError, match="no gate logits"):
        iterations([TracedRequest(0, (1,), (2,), (bare,))])


def test_load_balance() -> None:
    routed = iterations(REQUESTS)
    # Layer 0: 3, 3 and 2 tokens of 8; layer 1: 4, 1 and 3.
    balance = load_balance(routed)
    np.testing.assert_allclose(balance["smallest"], [0.75, 0.375])
    np.testing.assert_allclose(balance["largest"], [1.125, 1.5])
    prompts = load_balance(routed.at(~routed.decode))
    np.testing.assert_allclose(prompts["smallest"], [0, 0.75])
    np.testing.assert_allclose(prompts["largest"], [1.5, 1.5])


def test_overlap_leaves_out_the_step_from_prompt_to_answer() -> None:
    np.testing.assert_allclose(consecutive_overlap(iterations(REQUESTS))["overlap"], [0.5, 1])
    steady = request(0, [[2, 2], [1, 1]], [[0], [2]], [[0], [2]])
    np.testing.assert_allclose(consecutive_overlap(iterations([steady]))["overlap"], [1, 1])


def test_entropies() -> None:
    found = entropies(iterations(REQUESTS))
    # Request 0 splits each layer 3 : 1, request 1 splits layer 0 2 : 2 and layer 1 4 : 0.
    np.testing.assert_allclose(found["coarse"], [(THREE_TO_ONE + LN2) / 2, THREE_TO_ONE / 2])
    np.testing.assert_allclose(found["fine_counts"], [0, 0], atol=1e-12)
    np.testing.assert_allclose(found["fine_gate"], [1.5 * LN2] * 2, rtol=1e-6)


def test_heatmaps_of_the_first_request() -> None:
    heat = heatmaps(iterations(REQUESTS))
    shares = heat.to_numpy().reshape(2, EXPERTS, 2)
    np.testing.assert_allclose(shares[..., 0], [[0.75, 0.25, 0], [0, 0.25, 0.75]])
    np.testing.assert_allclose(shares[..., 1], [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    assert heat.columns.tolist() == ["coarse", "fine"]


WEIGHTS = arrays(np.int64, (4, 5), elements=st.integers(0, 50))


@given(WEIGHTS)
def test_entropy_is_between_none_and_uniform(weights: NDArray[np.int64]) -> None:
    found = entropy(weights)
    assert (found >= 0).all()
    assert (found <= math.log(5) + 1e-9).all()
    np.testing.assert_allclose(entropy(weights * 3), found, atol=1e-12)


def test_hit_rates() -> None:
    predicted = np.array([[True, True, False], [False, False, True]])
    activated = np.array([[True, False, True], [False, False, True]])
    assert hit_rates(predicted, activated).tolist() == [0.5, 1.0]


def test_an_interval_is_over_requests() -> None:
    request = np.repeat([0, 1, 2, 3], 100)
    alike = np.repeat([0.0, 0.0, 1.0, 1.0], 100)
    mean, low, high = mean_with_interval(alike, request)
    # Four requests that differ, not 400 independent values, whose interval would be 0.45 to 0.55.
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert mean_with_interval(np.ones(400), request) == (1, 1, 1)


def test_correlation_is_pearsons() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=300)
    y = 0.5 * x + random.normal(size=300)
    found, low, high = correlation(x, y, np.arange(300) % 30)
    assert found == pytest.approx(pearsonr(x, y).statistic)
    assert low < found < high
    assert correlation(x, 3 - 2 * x, np.arange(300) % 30)[0] == pytest.approx(-1)
    assert np.isnan(correlation(x, np.ones(300), np.arange(300) % 30)).all()


def test_bins_are_equally_wide() -> None:
    score, rate = np.array([0.0, 0.1, 0.9, 1.0]), np.array([0.0, 0.5, 0.5, 1.0])
    found = binned(score, rate, np.array([0, 0, 1, 1]), bins=4)
    assert found["count"].tolist() == [2, 2]
    np.testing.assert_allclose(found["score"], [0.05, 0.95])
    np.testing.assert_allclose(found["hit_rate"], [0.25, 0.75])
