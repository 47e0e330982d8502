"""Who leaves: orders of eviction against naive models, which look at all that happened."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.deepspeed import DeepSpeedPolicy
from baselines.least_stale import LeastStalePolicy
from baselines.lfu import ClassLruPolicy, LfruPolicy
from finemoe.offload.eviction import LayeredLruPolicy
from finemoe.offload.policy import ExpertId, Iteration, LayerOutcome, ModelShape, Policy

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=2)
SLOTS = 3


class Event(NamedTuple):
    """A use of an expert by so many tokens in a pass of the model, or, by none, a prefetch."""

    expert: ExpertId
    tokens: int
    missed: bool
    number: int


History = list[Event]
Victim = Callable[[History, list[ExpertId], ExpertId], ExpertId]


def last_of(history: History) -> dict[ExpertId, int]:
    return {event.expert: time for time, event in enumerate(history)}


def deepspeed(history: History, residents: list[ExpertId], incoming: ExpertId) -> ExpertId:
    others = [one for one in residents if one.layer != incoming.layer]
    return min(others or residents, key=last_of(history).__getitem__)


def layered(history: History, residents: list[ExpertId], incoming: ExpertId) -> ExpertId:
    held, last = Counter(one.layer for one in residents), last_of(history)
    fullest = max(held, key=lambda layer: (held[layer], layer == incoming.layer))
    tied = [layer for layer in held if held[layer] == held[fullest]]
    some = [fullest] if incoming.layer in tied else tied
    return min((one for one in residents if one.layer in some), key=last.__getitem__)


def lfru(history: History, residents: list[ExpertId], incoming: ExpertId) -> ExpertId:
    used = [event.expert for event in history if event.tokens]

    def score(one: ExpertId) -> float:
        times = [time for time, other in enumerate(used, 1) if other == one]
        return len(times) / (len(used) - max(times, default=0) + 1)

    return min(residents, key=score)


def class_lru(history: History, residents: list[ExpertId], incoming: ExpertId) -> ExpertId:
    uses, last = defaultdict[ExpertId, list[float]](list), dict[ExpertId, int]()
    passing, layers, tokens = set[ExpertId](), 0, 0.0
    for event in history:
        layers += event.tokens > 0
        tokens += event.tokens / SHAPE.layers
        if 0 < event.tokens <= 32:
            uses[event.expert].append(tokens)
            passing.discard(event.expert)
        elif event.missed:
            passing.add(event.expert)
        if 0 < event.tokens <= 32 or event.missed:
            last[event.expert] = layers

    def oldest(some: list[ExpertId]) -> ExpertId:
        return min(some, key=lambda one: last.get(one, 0))

    if leaving := [one for one in residents if one in passing]:
        return oldest(leaving)
    classes = defaultdict[int, list[ExpertId]](list)
    for one in residents:
        count = sum(0.5 ** ((tokens - use) / 128) for use in uses[one])
        classes[math.floor(math.log2(max(count, 1)))].append(one)
    tails = {oldest(some): 2**kind for kind, some in classes.items()}
    return max(tails, key=lambda one: (layers - last.get(one, 0)) / tails[one])


def least_stale(history: History, residents: list[ExpertId], by_visit: bool) -> ExpertId:
    now = [event for event in history if event.tokens][-1]
    entered = dict[ExpertId, tuple[int, int]]()  # when, and in which pass
    for time, (expert, tokens, missed, number) in enumerate(history):
        if missed or not tokens or entered[expert][1] != number:
            entered[expert] = time, number
    order = sorted(residents, key=entered.__getitem__)
    stale = [one for one in order if entered[one][1] < now.number or one.layer <= now.expert.layer]
    if by_visit and stale:
        return max(stale, key=lambda one: (one.layer - now.expert.layer - 1) % SHAPE.layers)
    return (stale or order)[0]


ORDERS: dict[str, tuple[Callable[[], Policy], Victim]] = {
    "deepspeed": (lambda: DeepSpeedPolicy(SHAPE), deepspeed),
    "layered": (lambda: LayeredLruPolicy(SHAPE), layered),
    "lfru": (lambda: LfruPolicy(SHAPE), lfru),
    "class_lru": (lambda: ClassLruPolicy(SHAPE), class_lru),
    "fifo": (lambda: LeastStalePolicy(SHAPE), lambda past, here, _: least_stale(past, here, False)),
    "next_visit": (
        lambda: LeastStalePolicy(SHAPE, "next_visit"),
        lambda past, here, _: least_stale(past, here, True),
    ),
}

experts = st.builds(ExpertId, st.integers(0, 2), st.integers(0, 3))
events = st.lists(
    st.tuples(experts, st.sampled_from([1, 1, 1, 7, 32, 33, 200, 0, 0]), st.integers(0, 4)),
    min_size=8,
    max_size=80,
)


def outcome(event: Event) -> LayerOutcome:
    iteration = Iteration(event.number, "decode", (0,), (event.tokens,))
    used = (event.expert.index,)
    kinds = ((), (), used) if event.missed else (used, (), ())
    return LayerOutcome(iteration, event.expert.layer, *kinds)


@pytest.mark.parametrize("order", ORDERS)
@given(happened=events)
def test_victims_are_a_naive_models(order: str, happened: list[tuple[ExpertId, int, int]]) -> None:
    """Uses and prefetches one by one; a fifth of the uses begin another pass of the model."""
    make, victim_of = ORDERS[order]
    policy, history, residents, number, layer = make(), History(), list[ExpertId](), 0, 0
    policy.begin_serving()
    for expert, drawn, turn in happened:
        absent, begins = expert not in residents, turn == 0 < drawn
        number, layer = number + begins, 0 if begins else layer
        # What the pass is through is not used any more.
        tokens = drawn if expert.layer >= layer else 0
        event = Event(expert, tokens, absent and tokens > 0, number)
        if tokens:
            layer = expert.layer
            policy.on_outcome(outcome(event))
            history.append(event)
        elif not history or not absent:
            continue
        if absent and len(residents) == SLOTS:
            keys, victim = policy.eviction_keys(expert, True), victim_of(history, residents, expert)
            # Of equal keys either may go; the engine takes the first.
            assert keys[victim] == max(keys[one] for one in residents)
            residents.remove(victim)
            policy.on_evict(victim)
        if absent:
            policy.on_load(expert)
            residents.append(expert)
        if not tokens:
            history.append(event)


def test_class_lru_has_eight_classes() -> None:
    policy, used = ClassLruPolicy(SHAPE), Event(ExpertId(0, 0), 1, False, 0)
    for _ in range(1000):  # 185 uses are the most that a use a token can count
        policy.on_outcome(outcome(used))
    for _ in range(3):
        policy.on_outcome(outcome(used._replace(expert=ExpertId(1, 0))))
    assert policy.eviction_keys(ExpertId(2, 0), True)[0, 0] == 3 / 2**7
