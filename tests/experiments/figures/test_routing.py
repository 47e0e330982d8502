"""Iterations, intervals and predictions on toy traces of two layers and three experts, by hand.

Two requests of a prompt of two tokens and two decoded ones each, top-1:

    request      prompt    decoded
    0, layer 0   0 0       0 1
    0, layer 1   2 1       2 2
    1, layer 0   2 2       1 1
    1, layer 1   0 0       0 0

A gate gives its choice 1/2 and the others 1/4.
"""

import math

import numpy as np
import pytest
from scipy.stats import pearsonr

from experiments.bootstrap import weights
from experiments.figures import routing
from finemoe.offload.policy import ModelShape
from finemoe.offload.routed import RoutedStep
from finemoe.trace import TracedRequest

EXPERTS = 3
SHAPE = ModelShape(layers=2, experts=EXPERTS, top_k=1, hidden_size=EXPERTS)
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
    routed = routing.iterations(REQUESTS)
    assert routed.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert routed.decode.tolist() == [False, True, True] * 2
    assert routed.counts[0].tolist() == [[2, 0, 0], [0, 1, 1]]
    np.testing.assert_allclose(routed.maps[0], [[0.5, 0.25, 0.25], [0.25, 0.375, 0.375]])
    assert routed.embeddings[1].tolist() == [1, 0, 0]


def test_an_interval_is_over_requests() -> None:
    request = np.repeat([0, 1, 2, 3], 100)
    alike = np.repeat([0.0, 0.0, 1.0, 1.0], 100)
    mean, low, high = routing.mean_with_interval(alike, request)
    # Four requests that differ, not 400 independent values, whose interval would be 0.45 to 0.55.
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert routing.mean_with_interval(np.ones(400), request) == (1, 1, 1)


def test_correlation_is_pearsons() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=300)
    y = 0.5 * x + random.normal(size=300)
    found, low, high = routing.correlation(x, y, np.arange(300) % 30)
    assert found == pytest.approx(pearsonr(x, y).statistic)
    assert low < found < high
    assert routing.correlation(x, 3 - 2 * x, np.arange(300) % 30)[0] == pytest.approx(-1)
    assert np.isnan(routing.correlation(x, np.ones(300), np.arange(300) % 30)).all()


def test_bins_are_equally_wide() -> None:
    score, rate = np.array([0.0, 0.1, 0.3, 1.0]), np.array([0.0, 0.5, 0.5, 1.0])
    found = routing.binned(score, rate, np.array([0, 0, 1, 1]), bins=4)
    assert found["count"].tolist() == [2, 1, 1]
    np.testing.assert_allclose(found["score"], [0.05, 0.3, 1.0])
    np.testing.assert_allclose(found["hit_rate"], [0.25, 0.5, 1.0])


def predicted(predictor: routing.Predictor, distance: int) -> list[list[int]]:
    """Return the one expert predicted for each iteration and layer."""
    found = predictor(distance)
    assert (found.sum(axis=-1) == 1).all()
    choices: list[list[int]] = found.argmax(axis=-1).tolist()
    return choices


def searched(history: routing.Iterations, measured: routing.Iterations) -> routing.Searched:
    return routing.search(history, measured, SHAPE, capacity=10, distance=1)


def test_request_counts_change_their_mind_as_the_request_goes_on() -> None:
    # Past counts: A = 4 0 0 | 0 0 4 and B = 0 4 0 | 4 0 0. The prompt (0 | 2) is A's, the second
    # token (1 | 0) half of either, the third (1 | 0) tips the scales, but only once it is seen.
    past_a = request(0, [[0, 0], [2, 2]], [[0], [2]], [[0], [2]])
    past_b = request(1, [[1, 1], [0, 0]], [[1], [0]], [[1], [0]])
    now = request(0, [[0], [2]], [[1], [0]], [[1], [0]], [[1], [0]])
    predictor = routing.request_counts(
        routing.iterations([past_a, past_b]), routing.iterations([now]), 1
    )
    # Layer 1 at distance 1: seen are the tokens before and layer 0 of this one.
    # A's : B's matching choices are 2 : 1, then 2 : 3, then 2 : 5.
    assert predicted(predictor, 1) == [[2], [0], [0]]
    # Layer 0 at distance 0 knows as much; layer 1 at distance 0 has 2 : 2 first, and A is first.
    assert predicted(predictor, 0) == [[0, 2], [1, 0], [1, 0]]


def test_a_trajectory_is_known_only_up_to_the_layer_that_ran() -> None:
    # Stored: 1 | 1, then 0 | 2. The query 0 | 1 looks like the second after layer 0; after layer 1
    # both are as near, and the first wins.
    history = routing.iterations([request(0, [[1], [1]], [[0], [2]])])
    measured = routing.iterations([request(0, [[2], [0]], [[0], [1]])])
    predictor = routing.trajectory_map(searched(history, measured), 1)
    assert predicted(predictor, 1) == [[2]]
    assert predicted(predictor, 0) == [[0, 1]]


def test_a_match_is_judged_by_what_it_says_of_the_layers_ahead() -> None:
    # By embedding the past iteration is at right angles; both layers of it say something else.
    history = routing.iterations([request(0, [[0, 0], [1, 1]], [[0], [1]])])
    measured = routing.iterations([request(0, [[2], [1]], [[2], [1]])])
    pairs = routing.compared_matches(searched(history, measured), measured, 1, distance=1)
    assert [values.tolist() for values in pairs["semantic"]] == [[0], [0.5], [0]]
    # After layer 0 gates (1/2 1/4 1/4) and (1/4 1/4 1/2) have a cosine of 5/6; layer 1 is hit.
    score, rate, _ = pairs["trajectory"]
    assert (score.tolist(), rate.tolist()) == (pytest.approx([5 / 6]), [1])


@pytest.mark.parametrize(
    ("point", "top_k", "semantic", "hits", "pearson"),
    [
        # Embeddings 1 0 0, 1/2 1/2 0 and 0 1 0. The three pairs, AB, AC and BC, share expert 0 in
        # layer 0, expert 2 in layer 1, and nothing.
        ("prefill", 1, [0.5**0.5, 0, 0.5**0.5], [0.5, 0.5, 0], (-0.5, 0.5)),
        # Of two experts B's second is one of A's and C's: 0 1 | 0 2 against 0 1 | 0 1.
        ("prefill", 2, [0.5**0.5, 0, 0.5**0.5], [0.75, 1, 0.75], (-1, 1)),
        # The first decoded token: 0 | 0, 0 | 1 and 2 | 0.
        ("first_decode", 1, [1, 0, 0], [0.5, 0.5, 0], (0.5, 1)),
    ],
)
def test_pairs_of_prompts_by_hand(
    point: str, top_k: int, semantic: list[float], hits: list[float], pearson: tuple[float, float]
) -> None:
    requests = [
        request(0, [[0, 0], [2, 2]], [[0], [0]], [[1], [1]]),
        request(1, [[0, 1], [0, 0]], [[0], [1]]),
        request(2, [[1, 1], [2, 2]], [[2], [0]]),
    ]
    found = routing.compared_prompts(routing.iterations(requests), point, top_k)
    for search, coefficient in zip(("semantic", "trajectory"), pearson, strict=True):
        score, rate, pairs = found[search]
        assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
        assert rate.tolist() == hits
        assert pearsonr(score, rate).statistic == pytest.approx(coefficient)
        assert routing.correlation(score, rate, pairs)[0] == pytest.approx(coefficient)
    assert found["semantic"][0] == pytest.approx(semantic, abs=1e-6)
    if point == "prefill":
        # A = 4 2 2 | 2 2 4, B = 3 3 2 | 4 2 2 and C = 2 4 2 | 2 2 4, in eighths.
        across = 42 / math.sqrt(48 * 46)
        assert found["trajectory"][0] == pytest.approx([across, 44 / 48, across])


def test_a_request_is_the_mean_of_its_iterations() -> None:
    # Embeddings (2 1 0)/3 and (1 2 0)/3; prefills and decodes swapped, so the same experts.
    requests = [request(n, [[n, n], [2, 2]], [[0], [2]], [[1], [2]]) for n in (0, 1)]
    found = routing.compared_prompts(routing.iterations(requests), "request", 2)
    assert found["semantic"][0] == pytest.approx([0.8])
    assert found["trajectory"][1].tolist() == [1]


def test_an_interval_over_pairs_draws_requests() -> None:
    rate = np.random.default_rng(1).random(10)
    pairs = np.stack(np.triu_indices(5, 1), axis=1)
    counts = weights(5, "requests")[1:]
    counted = counts[:, pairs[:, 0]] * counts[:, pairs[:, 1]]
    means = (counted @ rate)[counted.any(axis=1)] / counted.sum(axis=1)[counted.any(axis=1)]
    expected = rate.mean(), *np.percentile(means, [2.5, 97.5])
    assert routing.mean_with_interval(rate, pairs) == pytest.approx(expected)
