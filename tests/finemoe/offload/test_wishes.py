"""Wish lists of one link, against a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.offload.policy import ExpertId, ModelShape
from finemoe.offload.wishes import WishList

SHAPE = ModelShape(layers=3, experts=5, top_k=1, hidden_size=1)
FLAT = [ExpertId(layer, index) for layer in range(3) for index in range(5)]

priorities = st.sampled_from([0.1, 0.2, 0.3])
steps: st.SearchStrategy[tuple[str, int, Any]] = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 14), priorities),
    st.tuples(st.just("drop"), st.integers(0, 14), st.none()),
    st.tuples(st.just("drop_layer"), st.integers(0, 2), st.none()),
    st.tuples(
        st.just("put_all"),
        st.just(0),
        st.lists(st.none() | priorities, min_size=15, max_size=15),
    ),
    st.tuples(st.just("best"), st.just(0), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(devices=st.integers(1, 4), data=st.data())
def test_the_best_wish_is_that_of_a_dictionary(devices: int, data: st.DataObject) -> None:
    device = data.draw(st.integers(0, devices - 1))
    mine = FLAT[device::devices]
    wishes, expected = WishList(SHAPE, devices, device), dict[ExpertId, float]()
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
            expected = {e: p for e, p in expected.items() if e.layer != at}
        elif kind == "put_all":
            table = [1.0 if p is None else p for p in value][: len(mine)]
            where = np.array([p is not None for p in value][: len(mine)])
            wishes.put_all(np.array(table), where)
            expected |= {e: p for e, p, put in zip(mine, table, where, strict=True) if put}
        else:
            ranked = sorted(expected.items(), key=lambda wish: (-wish[1], wish[0]))
            assert wishes.best() == (ranked[0] if ranked else None)
            assert wishes.any() == bool(expected)
        assert [wishes.wished(e) for e in mine] == [e in expected for e in mine]
