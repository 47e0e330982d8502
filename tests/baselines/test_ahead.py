"""What policies compute at once, for a replay or from a history, is what they say gate by gate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.promoe import LearnedPredictor, ProMoEPolicy
from finemoe.offload.policy import (
    ExpertId,
    Gates,
    GateWeights,
    Iteration,
    LayerOutcome,
    ModelShape,
    Policy,
)
from tests.engine import OPTIONS, configured, machine

WIDE = ModelShape(layers=6, experts=60, top_k=4, hidden_size=8)
LEARNING = ("finemoe", "moe_infinity")
small_shapes = st.builds(
    ModelShape, st.integers(1, 7), st.integers(2, 6), st.integers(1, 2), st.just(3)
)


class Case(NamedTuple):
    """A system with options, a model of some shape, and the tokens of each request."""

    system: str
    options: dict[str, Any]
    shape: ModelShape
    tokens: list[tuple[int, ...]]
    seed: int


@st.composite
def cases(draw: st.DrawFn, system: str) -> Case:
    """Draw five iterations of one request or several; they overflow a small store."""
    options = {name: draw(st.sampled_from(values)) for name, values in OPTIONS[system].items()}
    requests = draw(st.integers(1, 3))
    prompt = draw(st.tuples(*[st.integers(1, 3)] * requests))
    tokens = [prompt, *[(1,) * requests] * 4]
    shape = draw(small_shapes | st.just(WIDE))
    return Case(system, options, shape, tokens, draw(st.integers(0, 2**32 - 1)))


def policy_of(case: Case, learned: bool = False) -> Policy:
    policy, shape = configured(case.system, case.shape, **case.options), case.shape
    draw = np.random.default_rng(case.seed)

    def normal(*size: int) -> Any:
        return draw.normal(size=size).astype(np.float32)

    biases = normal(shape.layers, shape.experts) if case.seed % 2 else None
    gates = GateWeights(normal(shape.layers, shape.experts, shape.hidden_size), biases)
    if policy.set_gates:
        policy.set_gates(gates)
    if policy.set_machine:
        policy.set_machine(machine((4,)))
    if policy.set_future_routing:
        policy.set_future_routing([gates.activated for _, _, gates in routed(case)])
    if learned and isinstance(policy, ProMoEPolicy):
        sources, hidden, out = shape.layers, shape.hidden_size, shape.experts
        weights = (sources, 5, hidden), (sources, 5), (sources, out, 5), (sources, out)
        policy._learned = LearnedPredictor(*[normal(*size) for size in weights])
    return policy


def routed(case: Case) -> Iterator[tuple[Iteration, Any, Gates]]:
    """Yield iterations with their embeddings (T, h) and what their gates say."""
    rng = np.random.default_rng(case.seed)
    layers, experts, width = case.shape.layers, case.shape.experts, case.shape.hidden_size
    for number, tokens in enumerate(case.tokens):
        phase: Any = "decode" if number else "prefill"
        iteration = Iteration(number, phase, tuple(range(len(tokens))), tokens)
        embeddings = rng.random((sum(tokens), width), dtype=np.float32)
        rows = rng.dirichlet(np.full(experts, 0.5), (layers, sum(tokens))).astype(np.float32)
        best = (-rows).argsort(axis=2)[:, :, : case.shape.top_k]
        hidden = rng.normal(size=(layers, sum(tokens), width)).astype(np.float32)
        activated = [tuple(np.unique(layer).tolist()) for layer in best]
        yield iteration, embeddings, Gates(rows, activated, hidden)


def answers(policy: Policy, case: Case, ahead: list[bool]) -> list[object]:
    """Serve a case, predicted ahead in some iterations; return all that is answered."""
    answered: list[Any] = []

    def ask_keys() -> None:
        for urgent in (False, True):
            answered.append(policy.eviction_keys(ExpertId(0, 0), urgent).copy())

    for (iteration, embeddings, gates), early in zip(routed(case), ahead, strict=True):
        answered.append(policy.on_embeddings(iteration, embeddings))
        if early and policy.predict_ahead:
            policy.predict_ahead(iteration, gates)
        for layer, activated in enumerate(gates.activated):
            policy.on_outcome(LayerOutcome(iteration, layer, activated, (), ()))
            ask_keys()
            answered.append(policy.on_gate(iteration, gates.of(layer)))
            ask_keys()
        answered.append(policy.end_iteration(iteration))
    for request in range(len(case.tokens[0])):
        policy.end_request(request)
    return [None if answer is None else answer.tolist() for answer in answered]


def saved(policy: Policy, path: Path) -> bytes:
    assert policy.history
    policy.history.save(path / "history", "a model")
    return (path / "history").read_bytes()


@pytest.mark.parametrize("system", OPTIONS)
@settings(max_examples=10)
@given(data=st.data(), ahead=st.lists(st.booleans(), min_size=5, max_size=5), learned=st.booleans())
def test_predicting_ahead_changes_no_answer(
    system: str, data: st.DataObject, ahead: list[bool], learned: bool
) -> None:
    case = data.draw(cases(system))
    slowly = answers(policy_of(case, learned), case, [False] * 5)
    assert answers(policy_of(case, learned), case, ahead) == slowly


@pytest.mark.parametrize("system", LEARNING)
@settings(max_examples=10)
@given(data=st.data())
def test_learning_is_as_serving(system: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    case = data.draw(cases(system))
    folder = tmp_path_factory.mktemp("history")
    learner, served = policy_of(case), policy_of(case)
    answers(served, case, [False] * 5)
    assert learner.learn
    for iteration, embeddings, gates in routed(case):
        learner.learn(iteration, embeddings, gates)
    for request in range(len(case.tokens[0])):
        learner.end_request(request)
    assert saved(learner, folder) == saved(served, folder)
    for policy in (learner, served):
        policy.begin_serving()
    after = case._replace(seed=case.seed ^ 1)
    assert answers(learner, after, [False] * 5) == answers(served, after, [False] * 5)
