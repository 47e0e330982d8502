"""Predictions in FineMoE's searcher: what they ask for, and that nothing else tells them apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.in_searcher import HitCountInSearcher, in_searcher
from finemoe.costs import Line, LinearCosts
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    GateWeights,
    Iteration,
    LayerOutcome,
    ModelShape,
    Policy,
    Priorities,
)
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.routed import RoutedStep, joined
from finemoe.offload.runtime import PredictionCosts
from finemoe.offload.virtual_links import LinkRate
from tests.command import config
from tests.engine import configured
from tests.finemoe.offload.states import asked

SHAPE = ModelShape(layers=4, experts=4, top_k=2, hidden_size=2)
DECODE = Iteration(0, "decode", (0,), (1,))
EMBEDDINGS = np.zeros((1, 2), np.float32)
# Rows are layers: tokens of a finished request by expert.
FIRST = np.array([[4, 4, 0, 0], [0, 4, 4, 0], [5, 2, 1, 0], [0, 1, 3, 4]], np.float32)
SECOND = np.array([[0, 0, 8, 8], [8, 0, 0, 8], [4, 4, 2, 6], [8, 4, 4, 0]], np.float32)


def gate(layer: int, *pairs: tuple[int, int], inputs: FloatArray | None = None) -> Gate:
    """Return a gate whose tokens go to these two experts each."""
    probabilities = np.full((len(pairs), 4), 0.1, np.float32)
    for row, pair in zip(probabilities, pairs, strict=True):
        row[[*pair]] = 0.4
    return Gate(layer, probabilities, tuple(sorted({e for pair in pairs for e in pair})), inputs)


# Speculation ----------------------------------------------------------------------------------


def test_the_later_gate_guesses_for_its_layer_alone() -> None:
    policy = in_searcher(SHAPE, "speculation", 2)
    weight = np.zeros((4, 4, 2), np.float32)
    weight[2] = np.log([[4, 1], [3, 1], [2, 1], [1, 10]])
    assert policy.set_gates
    policy.set_gates(GateWeights(weight))
    assert policy.on_embeddings(DECODE, EMBEDDINGS) is None
    first, second = [1.0, 0.0], [0.0, 1.0]
    spoken = gate(0, (2, 3), inputs=np.array([first], np.float32))
    # Softmax (.4, .3, .2, .1), two layers ahead.
    assert asked(policy.on_gate(DECODE, spoken)) == pytest.approx({(2, 0): 0.2, (2, 1): 0.15})
    # The other token's is (1, 1, 1, 10) / 13; each asks for two, and the surer one counts.
    spoken = gate(0, (2, 3), (2, 3), inputs=np.array([first, second], np.float32))
    both = {(2, 0): 0.2, (2, 1): 0.15, (2, 3): 5 / 13}
    assert asked(policy.on_gate(DECODE, spoken)) == pytest.approx(both)
    for layer in (2, 3):
        assert policy.on_gate(DECODE, gate(layer, (0, 1), inputs=EMBEDDINGS)) is None


# Hit count ------------------------------------------------------------------------------------


def hit_count(distance: int, *stored: FloatArray) -> HitCountInSearcher:
    policy = in_searcher(SHAPE, "hit_count", distance)
    assert isinstance(policy, HitCountInSearcher)
    for matrix in stored:
        policy.collection.add(matrix)
    return policy


def test_the_nearest_matrix_answers_for_layer_l_plus_d_alone() -> None:
    policy = hit_count(2, SECOND, FIRST)
    policy.on_embeddings(DECODE, EMBEDDINGS)
    # The first matrix; K of its ratios 5/8, 2/8, 1/8 two layers ahead, then of 4/8, 3/8, 1/8.
    assert asked(policy.on_gate(DECODE, gate(0, (0, 1)))) == {(2, 0): 5 / 16, (2, 1): 2 / 16}
    assert asked(policy.on_gate(DECODE, gate(1, (1, 2)))) == {(3, 3): 4 / 16, (3, 2): 3 / 16}
    for layer in (2, 3):
        assert asked(policy.on_gate(DECODE, gate(layer, (0, 1)))) == {}


def test_each_request_asks_for_k_experts() -> None:
    policy, both = hit_count(1, FIRST, SECOND), Iteration(0, "decode", (0, 1), (1, 1))
    policy.on_embeddings(both, np.zeros((2, 2), np.float32))
    policy.on_gate(both, gate(0, (0, 1), (2, 3)))
    # (5, 2, 1, 0) / 8 and (4, 4, 2, 6) / 16: the first asks for 0 and 1, the second for 3 and 0.
    wanted = asked(policy.on_gate(both, gate(1, (1, 2), (0, 3))))
    assert wanted == {(2, 0): 5 / 8, (2, 1): 2 / 8, (2, 3): 6 / 16}


def test_popular_experts_are_asked_for_below_layer_d() -> None:
    popular = asked(hit_count(2, FIRST, SECOND).on_embeddings(DECODE, EMBEDDINGS))
    # Of 24 tokens 8 went to each of experts 2 and 3; then 8, 4, 4, 8, two layers after -1.
    assert popular == pytest.approx({(0, 2): 1 / 3, (0, 3): 1 / 3, (1, 0): 1 / 6, (1, 3): 1 / 6})
    assert asked(hit_count(2).on_embeddings(DECODE, EMBEDDINGS)) == {}


# All in one searcher --------------------------------------------------------------------------

CELLS = [
    {key.removeprefix("system."): value for key, value in (word.split("=") for word in cell)}
    for cell in config("config", "experiment=figure14a").experiment.cells
]
IN_SEARCHER = [cell for cell in CELLS if cell["system"] in ("in_searcher", "finemoe")]


def policies(shape: ModelShape) -> list[Policy]:
    """Return the policies of the five cells of Figure 14a that are in FineMoE's searcher."""
    assert len(IN_SEARCHER) == 5
    return [configured(shape=shape, **cell) for cell in IN_SEARCHER]


events = st.lists(
    st.tuples(st.sampled_from(["use", "load"]), st.integers(0, 3), st.integers(0, 3)), max_size=40
)


@given(events, st.sampled_from(["lru", "lfu"]))
def test_finemoes_orders_without_maps_are_those_of_the_others(
    happened: list[tuple[str, int, int]], eviction: str
) -> None:
    options = {"prefetch_distance": 2, "eviction": eviction}
    alike = [configured("finemoe", SHAPE, **options)]
    for predictor in ("speculation", "hit_count"):
        alike.append(configured("in_searcher", SHAPE, predictor=predictor, **options))
    for half in (happened, happened[::2]):
        for policy in alike:
            policy.begin_serving()
            for event, *expert in half:
                if event == "load":
                    policy.on_load(ExpertId(*expert))
                else:
                    policy.on_outcome(LayerOutcome(DECODE, expert[0], (expert[1],), (), ()))
        of_finemoe, *others = [policy.eviction_keys(ExpertId(0, 0), False) for policy in alike]
        assert all((keys == of_finemoe).all() for keys in others)


WIDE = ModelShape(layers=8, experts=16, top_k=2, hidden_size=4)


def served(policy: Policy, scripted: bool) -> tuple[list[LayerOutcome], float]:
    """Serve three requests of random routing in virtual time; return what was found, and when.

    If `scripted` every system asks for the same, which is random, instead of what it predicts.
    """
    rng = np.random.default_rng(0)
    costs = LinearCosts(
        Line(0.0), Line(2.0), Line(0.0), Line(1.0), prediction=PredictionCosts(1.0, 1.0, 1.0)
    )
    weight = rng.normal(size=(WIDE.layers, WIDE.experts, WIDE.hidden_size)).astype(np.float32)
    if policy.set_gates:
        policy.set_gates(GateWeights(weight))
    script = rng.random((30, WIDE.layers, WIDE.layers, WIDE.experts))
    if scripted:

        def answer(iteration: Iteration, gate: Gate) -> Priorities:
            wanted = script[iteration.number, gate.layer]
            return np.where(wanted > 0.9, wanted, 0.0)

        policy.on_embeddings = lambda *_: None  # type: ignore[method-assign]
        policy.on_gate = answer  # type: ignore[method-assign]
        policy.predict_ahead = None
    residency = Residency(WIDE, MemoryPlan((20, 20), 4, 1), policy)
    replay, found = ReplayRuntime(policy, residency, costs, LinkRate(1.0)), list[LayerOutcome]()
    replay.listeners.append(found.append)
    for number in range(30):
        request, step = divmod(number, 10)
        replay.forward(joined(number, (request,), (routed(rng, 1 if step else 5),), (5 + step,)))
        if step == 9:
            replay.end_request(request)
    return found, replay.now


def routed(rng: np.random.Generator, tokens: int) -> RoutedStep:
    """Return a step of so many tokens with random routing that prefers low indices."""

    def normal(*size: int) -> FloatArray:
        return rng.normal(size=size).astype(np.float32)

    logits = normal(WIDE.layers, tokens, WIDE.experts) - 0.2 * np.arange(16, dtype=np.float32)
    best = (-logits).argsort(axis=2)[:, :, : WIDE.top_k]
    counts = np.stack([np.bincount(layer.ravel(), minlength=WIDE.experts) for layer in best])
    hidden = normal(WIDE.layers, tokens, WIDE.hidden_size)
    return RoutedStep(tokens, counts, logits, normal(tokens, WIDE.hidden_size), hidden)


def test_the_five_differ_in_nothing_but_what_they_predict() -> None:
    first, *others = [served(policy, scripted=True) for policy in policies(WIDE)]
    assert all(other == first for other in others)
    whole = [configured(shape=WIDE, **cell) for cell in CELLS if cell not in IN_SEARCHER]
    assert all(served(policy, scripted=True) != first for policy in whole)
    predicted = [served(policy, scripted=False) for policy in policies(WIDE)]
    assert all(any(outcome.hits for outcome in found) for found, _ in predicted)
    assert len({str(one) for one in predicted}) == 5
