"""The planner's parts, each alone: what it predicts, what an expert is worth, what it asks for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.foresight import ForesightPolicy
from baselines.gate_predictor import GatePredictor, Regression, centred
from baselines.map_memory import NEIGHBOURS, SHARPNESS, MapMemory
from baselines.planner import UseValue, planner
from finemoe.offload.policy import (
    ExpertId,
    Gates,
    GateWeights,
    Iteration,
    LayerOutcome,
    Machine,
    ModelShape,
)
from finemoe.offload.routed import softmax
from tests.finemoe.offload.states import decode, gate

SMALL = ModelShape(layers=2, experts=2, top_k=1, hidden_size=2)
WIDE = ModelShape(layers=5, experts=4, top_k=2, hidden_size=6)
Event = tuple[Iteration, Any, Any]


def normal(rng: np.random.Generator, *size: int) -> Any:
    return rng.normal(size=size).astype(np.float32)


def test_a_regression_finds_the_ridge_solution_and_what_it_leaves_over() -> None:
    """One source and target, one expert: y = 3 x, seen at x = 1 and -1, of a ridge of 2 to 1."""
    regression = Regression(1, 1, 1, 1, 2.0)
    own = np.array([[[1, 0, 0], [-1, 0, 0]]], np.float32)
    wanted = np.array([[[3], [-3]]], np.float32)
    regression.learn(0, own, np.zeros((2, 1), np.float32), wanted)
    regression.fit()
    # (2 + 2) w = 6 + 2, so w = 2; residuals of 1 twice, and 4 tokens of spread 1.
    scores = regression.scores(0, own[None, :, :1], np.zeros((1, 1, 1), np.float32))
    assert scores.item() == pytest.approx(1.7 * 2.0)


def test_the_token_before_is_an_input() -> None:
    """Layer 1 does the opposite of the token before; gates say nothing, layer 0 is a coin."""
    rng = np.random.default_rng(0)
    predictor = GatePredictor(SMALL, 2, 1e-3)
    predictor.set_gates(GateWeights(np.zeros((2, 2, 2), np.float32)))
    signs = np.array([rng.choice([-1, 1], 400), [1, -1] * 200])
    logs = (2 * signs[:, :, None] * np.array([1, -1])).astype(np.float32)
    nothing = [np.zeros((398, 2, 2), np.float32)] * 3
    predictor.learn(normal(rng, 3, 400, 2), logs, nothing)
    predictor.fit()
    known = np.zeros((4, 1, 2), np.float32)
    known[1, 0] = 2, -2
    # After the gate of layer 0: layer 1, and layer 0 of the next token.
    unused = np.zeros((1, 1, 4, 2), np.float32)
    likely = 1 - predictor.unlikely(1, np.zeros((1, 1, 2), np.float32), known, unused)[0][0, :, 0]
    assert likely[0] == pytest.approx([0, 1], abs=1e-3)
    assert likely[1] == pytest.approx([0.5, 0.5], abs=0.1)


def test_what_neighbours_used_is_an_input() -> None:
    """Layer 1 does what neighbours did; gates and layer 0 say nothing."""
    rng = np.random.default_rng(0)
    predictor = GatePredictor(SMALL, 1, 1e-3)
    predictor.set_gates(GateWeights(np.zeros((2, 2, 2), np.float32)))
    logs = np.zeros((2, 200, 2), np.float32)
    first = rng.choice([0.0, 1.0], 200).astype(np.float32)
    logs[1] = (4 * first - 2)[:, None] * np.array([1, -1])
    uses = np.stack([first, 1 - first], axis=1)[1:-1, None]
    nothing = np.zeros((198, 2, 2), np.float32)
    predictor.learn(normal(rng, 3, 200, 2), logs, [nothing, uses, nothing[:, :1]])
    predictor.fit()
    used, known = np.zeros((1, 1, 4, 2), np.float32), np.zeros((4, 1, 2), np.float32)
    used[..., 1, :] = 0, 1
    likely = 1 - predictor.unlikely(1, np.zeros((1, 1, 2), np.float32), known, used)[0][0, :, 0]
    assert likely[0] == pytest.approx([0, 1], abs=1e-3)


def test_without_a_history_the_later_gates_speak_for_themselves() -> None:
    rng = np.random.default_rng(1)
    weights, inputs = normal(rng, 5, 4, 6), normal(rng, 1, 1, 6)
    predictor = GatePredictor(WIDE, 3, 1.0)
    predictor.set_gates(GateWeights(weights))
    predictor.fit()
    logs = np.zeros((10, 1, 4), np.float32)
    used = np.zeros((1, 1, 10, 4), np.float32)
    likely = 1 - predictor.unlikely(1, inputs, logs, used)[0][0, :, 0]
    logits = np.einsum("lje,e->lj", weights[1:4], inputs[0, 0])
    assert (likely.argsort() == logits.argsort()).all()
    assert likely.sum(axis=1) == pytest.approx([2, 2, 2], abs=0.1)


# The memory ---------------------------------------------------------------------------------------


def test_the_memory_tells_what_tokens_of_like_maps_used_and_those_after_them() -> None:
    """Each of two maps comes ten times, by turns: whoever has one goes where it went."""
    memory = MapMemory(SMALL, 64)
    signs = np.array([[1, 1], [1, -1]] * 10, np.float32)  # of experts 0 in each layer
    logs = signs.T[:, :, None] * np.array([1, -1], np.float32)
    memory.begin(np.zeros((1, 64), np.float32))
    nobody = memory.uses(memory.compare(logs[:1, :1]), 0, 4)
    assert memory.is_empty
    assert not nobody.any()
    memory.add(logs)
    memory.begin(np.zeros((1, 64), np.float32))
    # Layer 0 is the same for both, so half of 16 neighbours are of each map.
    assert memory.uses(memory.compare(logs[:1, :1]), 0, 2)[0, 0, 0] == pytest.approx([1, 0])
    alike = memory.compare(logs[1:, 1:2])
    expected = [[1, 0], [0, 1], [1, 0], [1, 0]]  # map 1, and then always map 0
    assert memory.uses(alike, 0, 4)[0, 0] == pytest.approx(np.array(expected), abs=1e-6)
    assert memory.uses(alike, 1, 3)[0, 0] == pytest.approx(np.array(expected[1:3]), abs=1e-6)


@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    capacity=st.integers(1, 40),
)
def test_neighbours_are_those_of_largest_cosine(
    seed: int, lengths: list[int], capacity: int
) -> None:
    """Against all tokens in one list, the last `capacity` of which are kept."""
    rng = np.random.default_rng(seed)
    memory = MapMemory(WIDE, capacity)
    requests = [centred(normal(rng, 5, length, 4)) for length in lengths]
    for logs in requests:
        memory.add(logs)
    entries = [logs[:, t] for logs in requests for t in range(logs.shape[1])]
    last = {sum(lengths[: n + 1]) - 1 for n in range(len(lengths))}
    kept = [n for n in range(len(entries))[-capacity:] if n not in last]
    now, before = centred(normal(rng, 3, 1, 4)), centred(normal(rng, 5, 1, 4))
    memory.begin(np.zeros((1, capacity), np.float32))
    memory.compare(before)
    memory.begin(memory.context(memory.cosines))
    alike = memory.compare(now)[-1]
    used = memory.uses(alike, 0, 10)[0]
    assert np.array_equal(memory.uses(alike, 3, 8)[0], used[3:8])
    if not kept:
        assert memory.is_empty
        assert not used.any()
        return

    def cosine(a: Any, b: Any) -> float:
        return float((a * b).sum()) / float(np.sqrt((a**2).sum() * (b**2).sum()))

    def likeness(n: int) -> float:
        # The oldest entry's predecessor is the newest one, in its place.
        context = entries[n - 1] if n > len(entries) - capacity else entries[-1]
        there = len(entries) >= capacity or n > 0
        return cosine(now[:, 0], entries[n][:3]) + 0.3 * there * cosine(before[:, 0], context)

    best = sorted(kept, key=likeness)[-NEIGHBOURS:]
    scores = np.array([likeness(n) for n in best])
    weights = np.exp(SHARPNESS * (scores - scores.max()))
    chosen = np.zeros((len(entries), 5, 4))
    for n, entry in enumerate(entries):
        np.put_along_axis(chosen[n], entry.argsort(axis=1)[:, -2:], 1.0, axis=1)
    both = [np.concatenate([chosen[n], chosen[n + 1]]) for n in best]
    expected = np.average(both, axis=0, weights=weights)
    assert used == pytest.approx(expected, abs=2e-3)


def test_lessons_are_what_serving_the_request_would_have_said() -> None:
    rng = np.random.default_rng(7)
    memory = MapMemory(WIDE, 64)
    memory.add(centred(normal(rng, 5, 50, 4)))
    logs = centred(normal(rng, 5, 6, 4))
    lessons = list(memory.lessons(logs, 2))
    assert [one.shape for one in lessons] == [(4, 5, 4), *[(4, 2, 4)] * 5]
    context = np.zeros((1, 64), np.float32)
    for token in range(5):
        if token:
            served = memory.uses(context, 0, 5)[0]
            assert lessons[0][token - 1] == pytest.approx(served, abs=1e-4)
        memory.begin(context)
        for layer in range(5):
            alike = memory.compare(logs[layer : layer + 1, token : token + 1])
            if token:
                served = memory.uses(alike, layer + 1, layer + 3)[0, 0]
                assert lessons[layer + 1][token - 1] == pytest.approx(served, abs=1e-4)
        context = memory.context(memory.cosines)


# The value ----------------------------------------------------------------------------------------


def test_value_is_discounted_expected_uses() -> None:
    value = UseValue(SMALL, discount=0.5, recency=0.5)
    value.begin((7,))
    assert value.rates.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    likely = np.array([[1.0, 0.0], [0.5, 0.25]])
    # Before layer 0: one and two layers away, then every two layers: 1/4 + 1/16 + ... = 1/3.
    expected = [
        [0.5 * (1 + 0.5 / 3), 0.5 * 0.5 / 3],
        [0.25 * (0.5 + 0.5 / 3), 0.25 * (0.25 + 0.5 / 3)],
    ]
    assert value.of(0, likely) == pytest.approx(np.array(expected))
    # Before layer 1 the layers have changed places.
    assert value.of(1, likely)[::-1] == pytest.approx(value.of(0, likely[::-1]))


def test_averages_follow_each_request_and_are_joined() -> None:
    value = UseValue(SMALL, discount=0.5, recency=0.5)
    first, second = [0.9, 0.1], [0.2, 0.8]
    value.begin((1, 2))
    rates = value.observe(decode(0, 1, 2), 0, np.array([[first, second]], np.float32))
    # Of request 1 (0.75, 0.25), of request 2 (0.25, 0.75): one of both 1 - 0.25 * 0.75.
    assert rates[0] == pytest.approx([0.8125, 0.8125])
    value.begin((1,))
    assert value.rates[0] == pytest.approx([0.75, 0.25])
    value.end(1)
    value.begin((1,))
    assert value.rates[0] == pytest.approx([0.5, 0.5])


def served(seed: int, horizon: int = 2, threshold: float = 0.1, memory: int = 64) -> Any:
    """Return a policy that has its gates and a history of two requests."""
    rng = np.random.default_rng(seed)
    policy = planner(WIDE, horizon=horizon, threshold=threshold, memory=memory)
    policy.predictor.set_gates(GateWeights(normal(rng, 5, 4, 6)))
    for _ in range(2):
        for event in events(rng, 8):
            policy.learn(*event)
        policy.end_request(0)
    policy.begin_serving()
    return policy


def events(rng: np.random.Generator, count: int) -> list[Event]:
    """Draw iterations of one request: its prompt of three tokens, then one token each."""
    drawn = []
    for number in range(count):
        tokens = 1 if number else 3
        phase: Any = "decode" if number else "prefill"
        rows = softmax(3 * normal(rng, 5, tokens, 4))
        best = (-rows).argsort(axis=2)[..., :2]
        activated = [tuple(np.unique(layer).tolist()) for layer in best]
        gates = Gates(rows, activated, normal(rng, 5, tokens, 6))
        drawn.append((Iteration(number, phase, (0,), (tokens,)), normal(rng, tokens, 6), gates))
    return drawn


def test_it_asks_for_likely_absent_experts_that_are_still_to_come_the_nearest_first() -> None:
    policy = served(3, threshold=0.3)
    iteration, embeddings, gates = events(np.random.default_rng(4), 1)[0]
    policy.on_load(ExpertId(3, 0))
    policy.on_embeddings(iteration, embeddings)
    requests = policy.on_gate(iteration, gates.of(0))
    likely, away = policy._likely, np.arange(5)[:, None].clip(1)
    expected = np.where(likely >= 0.3, likely / np.sqrt(away), 0)
    expected[0] = expected[3, 0] = 0
    assert requests == pytest.approx(expected)
    assert (requests > 0).any()
    policy.on_evict(ExpertId(3, 0))
    again = policy.on_gate(iteration, gates.of(0))
    assert (again[3, 0] > 0) == (likely[3, 0] >= 0.3)


@pytest.mark.parametrize("memory", [0, 64])
def test_what_no_prediction_reaches_goes_by_neighbours_and_averages(memory: int) -> None:
    """Of a prompt of three tokens, the last one of which leads on to the next token."""
    policy = served(3, horizon=1, memory=memory)
    iteration, embeddings, gates = events(np.random.default_rng(4), 1)[0]
    policy.on_embeddings(iteration, embeddings)
    for layer in range(3):
        policy.on_gate(iteration, gates.of(layer))
    rates, share = policy.value.rates, 0.75 if memory else 0.0
    uses = policy.memory.uses(policy.memory.cosines, 0, 10)
    # The gate of layer 2 of five tells of layer 3 alone.
    assert policy._likely[:3] == pytest.approx(share * uses[-1, 5:8] + (1 - share) * rates[:3])
    own = 1 - (1 - uses[:, 4]).prod(axis=0)
    assert policy._likely[4] == pytest.approx(share * own + (1 - share) * rates[4])
    assert (uses.max() > 0) == (memory > 0)


def test_tokens_that_follow_nobody_go_by_what_is_usual() -> None:
    policy = served(3)
    iteration, embeddings, _ = events(np.random.default_rng(4), 1)[0]
    policy.on_embeddings(iteration, embeddings)
    usual = np.broadcast_to(policy.memory.usual, (1, 3, 5, 4))
    assert usual.sum(axis=-1) == pytest.approx(2.0)
    assert np.array_equal(policy._likely, policy._probable(0, embeddings[None], usual)[0])


def test_what_was_served_is_remembered() -> None:
    policy = planner(WIDE)
    policy.predictor.set_gates(GateWeights(normal(np.random.default_rng(2), 5, 4, 6)))
    policy.begin_serving()
    answers(policy, events(np.random.default_rng(4), 3), False)
    assert policy.memory.is_empty
    policy.end_request(0)
    assert policy.memory.usual.sum() == pytest.approx(10)


def test_while_the_last_layers_run_it_asks_for_the_next_tokens_first() -> None:
    policy = served(3, horizon=3)
    iteration, embeddings, gates = events(np.random.default_rng(4), 1)[0]
    policy.on_embeddings(iteration, embeddings)
    requests = [policy.on_gate(iteration, gates.of(layer)) for layer in range(4)][-1]
    # The gate of layer 3 of five tells of layer 4, and of 0 and 1 of the next token.
    distance = np.array([2, 3, np.inf, np.inf, 1])[:, None]
    expected = np.where(policy._likely >= 0.1, policy._likely / np.sqrt(distance), 0)
    assert requests == pytest.approx(expected)
    assert (requests > 0).any(axis=1).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(("share", "least"), [(1.0, 0.3), (0.8, 0.3), (0.25, 0.75)])
def test_where_links_share_memory_only_surer_copies_begin(share: float, least: float) -> None:
    policy = served(3, threshold=0.3)
    policy.set_machine(Machine((4,), 1.0, float, float, share))
    iteration, embeddings, _ = events(np.random.default_rng(4), 1)[0]
    requests = policy.on_embeddings(iteration, embeddings)
    assert ((requests > 0) == (policy._likely >= least)).all()
    assert 0 < np.count_nonzero(requests) < requests.size


def test_a_prefetch_displaces_less_value_and_nobody_else() -> None:
    policy = served(5)
    iteration, embeddings, _ = events(np.random.default_rng(6), 1)[0]
    policy.on_embeddings(iteration, embeddings)
    value = policy.value.of(0, policy._likely)
    incoming = ExpertId(1, 2)
    assert (policy.eviction_keys(incoming, True) == -value).all()
    assert (policy.eviction_keys(incoming, False) == -value).all()
    assert policy.placement.displaces_less


@given(
    seed=st.integers(0, 2**16),
    when=st.integers(0, 3),
    layer=st.integers(-1, 4),
    ahead=st.booleans(),
)
def test_no_answer_depends_on_the_future(seed: int, when: int, layer: int, ahead: bool) -> None:
    """What follows layer `layer` of iteration `when` is permuted and drawn anew."""
    past, other = (events(np.random.default_rng(seed + n), 4) for n in (0, 1))
    changed = past[:when] + other[when:]
    iteration, embeddings, gates = past[when]
    anew, split = other[when][2], layer + 1
    mixed = Gates(
        np.concatenate([gates.probabilities[:split], anew.probabilities[split:][::-1]]),
        [*gates.activated[:split], *anew.activated[split:][::-1]],
        np.concatenate([gates.hidden_states[:split], anew.hidden_states[split:][::-1]]),
    )
    changed[when] = iteration, embeddings, mixed
    known = 7 * when + split + 1
    first, second = (answers(served(9), trace, ahead)[:known] for trace in (past, changed))
    assert len(first) == known
    assert first == second


def answers(policy: Any, trace: list[Event], ahead: bool) -> list[Any]:
    """Return what is asked for and kept after embeddings, every gate, and every iteration."""
    found: list[Any] = []

    def note(requests: Any) -> None:
        found.append((requests.tolist(), policy.eviction_keys(ExpertId(0, 0), False).tolist()))

    for iteration, embeddings, gates in trace:
        note(policy.on_embeddings(iteration, embeddings))
        if ahead:
            policy.predict_ahead(iteration, gates)
        for layer in range(5):
            note(policy.on_gate(iteration, gates.of(layer)))
        note(policy.end_iteration(iteration))
    return found


ROUTING = [[(0,), (1,)], [(1,), (0,)]]


def foresight(of: Any) -> Any:
    policy = ForesightPolicy(SMALL, of)
    policy.predictor.set_gates(GateWeights(np.zeros((2, 2, 2), np.float32)))
    policy.begin_serving()
    policy.set_future_routing(ROUTING)
    return policy


def test_told_of_layers_it_asks_for_what_they_will_activate() -> None:
    policy = foresight("layers")
    asked = policy.on_embeddings(decode(0, 5), np.zeros((1, 2), np.float32))
    assert (asked > 0).tolist() == [[True, False], [False, True]]
    policy.on_gate(decode(0, 5), gate(0, (0.5, 0.5), hidden=[[0, 0]]))
    # Layer 1 still to come, and layer 0 of the next token.
    assert policy.eviction_keys(ExpertId(0, 0), True).argmin(axis=1).tolist() == [1, 1]


def test_told_of_uses_it_evicts_by_the_next_one() -> None:
    policy = foresight("eviction")
    policy.on_outcome(LayerOutcome(decode(0, 5), 0, (), (), (0,)))
    # Steps of the next uses after layer 0 of token 0: never, 2; 3, 1.
    keys = policy.eviction_keys(ExpertId(1, 1), True)
    assert (keys[0, 0], keys[1, 0] > keys[0, 1] > keys[1, 1]) == (np.inf, True)
    assert policy.placement.displaces_less


def test_told_of_nothing_it_is_the_planner() -> None:
    told, plain = foresight("nothing"), planner(SMALL)
    plain.predictor.set_gates(GateWeights(np.zeros((2, 2, 2), np.float32)))
    plain.begin_serving()
    embeddings = np.ones((1, 2), np.float32)
    both: Any = [one.on_embeddings(decode(0, 5), embeddings) for one in (told, plain)]
    assert np.array_equal(*both)
