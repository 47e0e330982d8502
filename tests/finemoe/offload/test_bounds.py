"""The fewest loads, by hand, against exhaustive search, and against schedules of every kind."""

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.bounds import Roofline, critical_path, minimal_loads
from finemoe.offload.policy import ModelShape, Routing

ONE_LAYER = ModelShape(layers=1, experts=4, top_k=1, hidden_size=1)
TWO_LAYERS = ModelShape(layers=2, experts=3, top_k=2, hidden_size=1)
A, B, C, D = range(4)


def stream(*experts: int) -> Routing:
    """Return a routing of one layer and one expert an iteration."""
    return [[(expert,)] for expert in experts]


def sets(*activated: tuple[int, ...]) -> Routing:
    return [[one] for one in activated]


@st.composite
def routings(draw: st.DrawFn, shape: ModelShape, widest: int, longest: int) -> Routing:
    layer = st.sets(st.integers(0, shape.experts - 1), min_size=1, max_size=widest)
    layers = st.lists(
        layer.map(lambda s: tuple(sorted(s))), min_size=shape.layers, max_size=shape.layers
    )
    return draw(st.lists(layers, min_size=1, max_size=longest))


def cheapest(routing: Routing, slots: int, contents: frozenset[int] | None = None) -> int:
    """Return the fewest loads by trying every order within a layer and every eviction.

    One layer, one device. Experts compute one after another, the weakest demand that any system
    can make; prefetching is not tried because it saves no load.
    """

    @cache
    def after(number: int, left: frozenset[int], resident: frozenset[int]) -> int:
        if not left:
            if number + 1 == len(routing):
                return 0
            return after(number + 1, frozenset(routing[number + 1][0]), resident)
        costs = []
        for expert in left:
            rest = left - {expert}
            if expert in resident:
                costs.append(after(number, rest, resident))
            elif len(resident) < slots:
                costs.append(1 + after(number, rest, resident | {expert}))
            else:
                costs += [1 + after(number, rest, resident - {v} | {expert}) for v in resident]
        return min(costs)

    return after(0, frozenset(routing[0][0]), contents or frozenset())


def test_experts_of_one_layer_may_take_turns_in_one_slot() -> None:
    # c keeps one slot until it is used again; a leaves the other before b comes.
    assert minimal_loads(sets((A, C), (A, B), (C,)), ONE_LAYER, (2,)) == (3,)


def test_a_layer_wider_than_the_slots_runs_in_waves() -> None:
    # All four, and then the two that did not stay.
    assert minimal_loads(sets((A, B, C, D), (A, B, C, D)), ONE_LAYER, (2,)) == (6,)


def test_each_device_has_its_own_cache() -> None:
    # Device 0 serves (0, 0), (0, 2), (1, 1), device 1 the others.
    routing: Routing = [[(0, 1, 2), (1,)], [(0, 1, 2), (1,)]]
    assert minimal_loads(routing, TWO_LAYERS, (3, 1)) == (3, 1)
    # In its only slot, device 0 has (1, 1) between two uses of the others, and the other way round.
    assert minimal_loads(routing, TWO_LAYERS, (1, 1)) == (6, 1)


def test_what_a_slot_held_before_the_measured_part_is_free() -> None:
    experts = stream(D, D, A, B, A, B)
    assert minimal_loads(experts, ONE_LAYER, (1,), measured_from=2) == (3,)
    assert minimal_loads(experts, ONE_LAYER, (2,), measured_from=2) == (0,)
    assert minimal_loads(experts, ONE_LAYER, (2,)) == (3,)


@settings(max_examples=60)
@given(routings(ONE_LAYER, widest=1, longest=10), st.integers(1, 4))
def test_the_bound_is_reached_where_a_layer_runs_one_expert(routing: Routing, slots: int) -> None:
    assert minimal_loads(routing, ONE_LAYER, (slots,)) == (cheapest(routing, slots),)


@settings(max_examples=60)
@given(routings(ONE_LAYER, widest=3, longest=7), st.integers(1, 4))
def test_no_order_and_no_eviction_beats_the_bound(routing: Routing, slots: int) -> None:
    assert minimal_loads(routing, ONE_LAYER, (slots,))[0] <= cheapest(routing, slots)


@settings(max_examples=100)
@given(routings(ONE_LAYER, widest=2, longest=7), st.integers(1, 3), st.integers(1, 3))
def test_no_contents_at_the_start_beat_the_bound(routing: Routing, slots: int, start: int) -> None:
    measured = routing[start:]
    contents = itertools.combinations(range(4), slots)
    best = min(cheapest(measured, slots, frozenset(one)) for one in contents) if measured else 0
    assert minimal_loads(routing, ONE_LAYER, (slots,), measured_from=start)[0] <= best


def test_links_that_are_busy_one_after_the_other_add_up() -> None:
    # Device 0 has A and C, device 1 B and D, each in one slot: three loads, then three more.
    experts, nothing = stream(A, C, A, C, B, D, B, D), [0.0] * 8
    assert minimal_loads(experts, ONE_LAYER, (1, 1)) == (4, 4)
    assert critical_path(experts, ONE_LAYER, (1, 1), nothing, 4.0)[0] == 3 * 4 + 3 * 4
    assert critical_path(experts, ONE_LAYER, (1, 1), nothing, 4.0, 5.0)[0] == 3 * 5 + 3 * 5
    # What slots hold at the start is free, and all that both hold always.
    assert critical_path(experts, ONE_LAYER, (2, 2), nothing, 4.0)[0] == 0
    assert critical_path(experts, ONE_LAYER, (2, 1), nothing, 4.0)[0] == 3 * 4
    assert critical_path(experts, ONE_LAYER, (1, 2), nothing, 4.0)[0] == 3 * 4


def test_compute_and_loads_wait_for_each_other() -> None:
    # A is there, B cannot come before A has computed, nor A again before B has.
    experts = stream(A, B, A, A, A)
    assert critical_path(experts, ONE_LAYER, (1,), [1.0] * 5, 4.0)[0] == 2 * 4 + 2 * 1
    assert critical_path(experts, ONE_LAYER, (1,), [9.0, 1.0, 1.0, 1.0, 1.0], 4.0)[0] == 9 + 4 + 2
    # Of two slots B takes one while A computes in the other.
    assert critical_path(experts, ONE_LAYER, (2,), [1.0] * 5, 4.0)[0] == 5
    # B again, 20 times: it cannot come before A has computed for the last but one time, after 9.
    long = stream(A, B, A, A, A, *[B] * 20)
    assert critical_path(long, ONE_LAYER, (1,), [1.0] * 25, 4.0)[0] == 9 + 4 + 19


def test_a_part_of_a_path_starts_anew() -> None:
    experts = stream(A, B, A, B, A)
    parts = [range(0, 2), range(1, 5), range(4, 5), range(2, 2)]
    whole, *alone = critical_path(experts, ONE_LAYER, (1,), [1.0] * 5, 4.0, parts=parts)
    assert whole == 4 * 4
    # Whoever is asked for first may be there: one load, three, none; nothing takes no time.
    assert alone == [4, 3 * 4, 1, 0]
    # Stretches start every second layer: of an odd one before the first, compute alone counts.
    shape = ModelShape(layers=9, experts=2, top_k=1, hidden_size=1)
    odd = [[(n % 2,) for n in range(9)], [(n % 2,) for n in range(9)]]
    whole, second = critical_path(odd, shape, (1,), [1.0] * 18, 0.0, parts=[range(1, 2)])
    assert (whole, second) == (18, 9)


def fastest(experts: tuple[int, ...], slots: int, compute: int, load: int) -> int:
    """Return the fewest ticks in which one device runs experts in turn, by trying every schedule.

    Any contents are granted at the start; a load takes its slot when it begins.
    """
    starts = itertools.combinations(range(4), slots)
    # Who computes, ticks left of that (0: it waits), residents, who loads, ticks left of that.
    states = {(0, 0, frozenset(one), -1, 0) for one in starts}
    for ticks in itertools.count():
        after = set()
        for step, left, resident, coming, wait in states:
            if coming >= 0 and wait == 0:
                resident, coming = resident | {coming}, -1
            if step < len(experts) and left == 0 and experts[step] in resident:
                left = compute
            if step == len(experts):
                return ticks
            choices = [(resident, coming, wait)]
            if coming < 0:
                kept = {experts[step]} if left else set()
                choices += [
                    (resident - {gone}, new, load)
                    for new in set(range(4)) - resident
                    for gone in resident - kept
                ]
            for there, new, remaining in choices:
                done = left == 1
                after.add((step + done, max(left - 1, 0), there, new, max(remaining - 1, 0)))
        states = after
    raise AssertionError


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_no_schedule_is_faster_than_the_path(
    experts: tuple[int, ...], slots: int, compute: int, load: int
) -> None:
    layer_s = [float(compute)] * len(experts)
    bound, *_ = critical_path(stream(*experts), ONE_LAYER, (slots,), layer_s, float(load))
    assert bound <= fastest(experts, slots, compute, load)


def test_the_bound_is_the_largest_of_compute_links_and_path() -> None:
    roof = Roofline(compute_s=2.0, link_s=2.5, path_s=0.0, tpot_s=None)
    assert roof.total == 2.5
    assert roof.times(5.0) == 2.0
    assert Roofline(4.0, 2.5, 3.0, None).total == 4.0
    assert Roofline(4.0, 2.5, 4.5, None).total == 4.5
    with pytest.raises(ValueError, match="0 s"):
        Roofline(0.0, 0.0, 0.0, None).times(1.0)
