"""Wish lists of one link, against a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.policy import ModelShape
from finemoe.offload.wishes import WishList

SHAPE = ModelShape(layers=3, experts=5, top_k=1, hidden_size=1)
PLACES = range(SHAPE.size)

priorities = st.sampled_from([0.1, 0.2, 0.3])
steps: st.SearchStrategy[tuple[str, int, Any]] = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 14), priorities),
    st.tuples(st.just("drop"), st.integers(0, 14), st.none()),
    st.tuples(st.just("drop_layer"), st.integers(0, 2), st.none()),
    st.tuples(
        st.just("put_all"),
        st.integers(0, 2),
        st.tuples(
            st.lists(st.just(0.0) | priorities, min_size=15, max_size=15),
            st.lists(st.integers(0, 1), min_size=15, max_size=15),
        ),
    ),
    st.tuples(st.just("best"), st.just(0), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(devices=st.integers(1, 4), data=st.data())
def test_the_best_wish_is_that_of_a_dictionary(devices: int, data: st.DataObject) -> None:
    device = data.draw(st.integers(0, devices - 1))
    mine = PLACES[device::devices]
    wishes, expected = WishList(SHAPE, devices, device), dict[int, float]()
    for kind, at, value in data.draw(st.lists(steps, max_size=30)):
        expert = mine[at % len(mine)]
        if kind == "put":
            wishes.put(expert, value)
            expected[expert] = value
        elif kind == "drop":
            wishes.drop(expert)
            expected.pop(expert, None)
        elif kind == "drop_layer":
            wishes.drop_layer(at)
            expected = {e: p for e, p in expected.items() if e // 5 != at}
        elif kind == "put_all":
            priorities_of, marks = value
            wishes.put_all(np.array(priorities_of), bytearray(marks), at)
            table = zip(PLACES, priorities_of, marks, strict=True)
            expected |= {
                e: p for e, p, marked in table if marked and p and e in mine and e // 5 >= at
            }
        else:
            ranked = sorted(expected.items(), key=lambda wish: (-wish[1], wish[0]))
            assert wishes.best() == (ranked[0][0] if ranked else -1)
            assert not ranked or wishes.highest == ranked[0][1]
        assert [wishes.wished(e) for e in mine] == [e in expected for e in mine]
