"""The fewest loads, by hand, against exhaustive search, and against schedules of every kind."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.bounds import Roofline, minimal_loads
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
def test_no_contents_at_the_start_of_the_measured_part_beat_it(
    routing: Routing, slots: int, start: int
) -> None:
    measured = routing[start:]
    contents = itertools.combinations(range(4), slots)
    best = min(cheapest(measured, slots, frozenset(one)) for one in contents) if measured else 0
    assert minimal_loads(routing, ONE_LAYER, (slots,), measured_from=start)[0] <= best


def test_the_roofline_is_the_larger_of_compute_and_links() -> None:
    roof = Roofline(compute_s=2.0, link_s=2.5)
    assert roof.total == 2.5
    assert roof.times(5.0) == 2.0
    assert Roofline(4.0, 2.5).total == 4.0
    with pytest.raises(ValueError, match="0 s"):
        Roofline(0.0, 0.0).times(1.0)
