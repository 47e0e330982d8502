"""The expert cache against a naive model of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from finemoe.offload.cache import NO_SLOT, NOBODY, ExpertCache, Slot
from finemoe.offload.policy import ExpertId, ModelShape
from tests.finemoe.offload.states import State, state

SHAPE = ModelShape(layers=3, experts=4, top_k=1, hidden_size=1)
EXPERTS = list(range(SHAPE.size))
KEYS = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, np.inf])

experts = st.sampled_from(EXPERTS)


def at(layer: int, index: int) -> int:
    return SHAPE.flat(ExpertId(layer, index))


class CacheMachine(RuleBasedStateMachine):
    """Reserves, loads, pins and evicts; knows each expert's slot, state and pins by itself."""

    @initialize(slots=st.lists(st.integers(1, 4), min_size=1, max_size=3))
    def start(self, slots: list[int]) -> None:
        self.slots = slots
        self.keys = dict.fromkeys(EXPERTS, 0.0)
        self.cache = ExpertCache(SHAPE, slots, self.eviction_keys)
        self.placed: dict[int, Slot] = {}
        self.residents: set[int] = set()
        self.pins: Counter[int] = Counter()
        self.peak = 0

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> NDArray[np.float64]:
        assert SHAPE.flat(incoming) not in self.placed, (
            "keys are asked for an expert that has a slot"
        )
        return np.array([self.keys[expert] for expert in EXPERTS]).reshape(3, 4)

    def device(self, expert: int) -> int:
        return expert % len(self.slots)

    def neighbours(self, expert: int) -> set[int]:
        return {held for held in self.placed if self.device(held) == self.device(expert)}

    @rule(expert=experts, key=KEYS)
    def rank(self, expert: int, key: float) -> None:
        self.keys[expert] = key

    @rule(expert=experts, protected=st.booleans())
    def protect(self, expert: int, protected: bool) -> None:
        self.cache.protected[expert] = protected

    @rule(expert=experts, urgent=st.booleans())
    def reserve(self, expert: int, urgent: bool) -> None:
        if expert in self.placed:
            with pytest.raises(ValueError, match="already has a slot"):
                self.cache.reserve(expert, urgent)
            return
        neighbours = self.neighbours(expert)
        has_room = len(neighbours) < self.slots[self.device(expert)]
        assert self.cache.has_room(self.device(expert)) == has_room
        evictable = {e for e in neighbours & self.residents if not self.pins[e]}
        allowed = {e for e in evictable if not self.cache.protected[e]}
        if urgent and not allowed:
            allowed = evictable
        elif not urgent:
            allowed = {e for e in allowed if self.keys[e] > -np.inf}
        evicted = self.cache.reserve(expert, urgent)
        if evicted == NO_SLOT:
            assert not has_room
            assert not allowed
        else:
            self.check_reservation(expert, evicted, has_room, allowed)

    def check_reservation(
        self, expert: int, evicted: int, has_room: bool, allowed: set[int]
    ) -> None:
        slot = self.cache.slot(expert)
        if evicted == NOBODY:
            assert has_room
        else:
            assert not has_room
            assert evicted in allowed
            best = max(self.keys[e] for e in allowed)
            assert evicted == min(e for e in allowed if self.keys[e] == best)
            assert self.placed.pop(evicted) == slot
            self.residents.discard(evicted)
        assert slot.device == self.device(expert)
        assert 0 <= slot.index < self.slots[slot.device]
        self.placed[expert] = slot
        self.peak = max(self.peak, len(self.placed))

    @rule(expert=experts)
    def arrive(self, expert: int) -> None:
        if expert in self.placed and expert not in self.residents:
            self.cache.loaded(expert)
            self.residents.add(expert)
        else:
            with pytest.raises(ValueError, match="not loading"):
                self.cache.loaded(expert)

    @rule(expert=experts)
    def abandon(self, expert: int) -> None:
        if expert in self.placed and expert not in self.residents:
            self.cache.abandon(expert)
            del self.placed[expert]
        else:
            with pytest.raises(ValueError, match="not loading"):
                self.cache.abandon(expert)

    @rule(expert=experts)
    def pin(self, expert: int) -> None:
        self.cache.pin(expert)
        self.pins[expert] += 1

    @precondition(lambda self: self.pins.total() > 0)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from(sorted(self.pins.elements())))
        self.cache.unpin(expert)
        self.pins[expert] -= 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check_integrity()
        assert self.cache.occupied == len(self.placed) <= sum(self.slots)
        assert self.cache.peak_occupied == self.peak <= sum(self.slots)
        for expert in EXPERTS:
            assert self.cache.device_of(expert) == self.device(expert)
            assert state(self.cache, expert) is self.expected_state(expert)
            assert self.cache.is_pinned(expert) == (self.pins[expert] > 0)
        assert {expert: self.cache.slot(expert) for expert in self.placed} == self.placed
        assert len(set(self.placed.values())) == len(self.placed)

    def expected_state(self, expert: int) -> State:
        if expert not in self.placed:
            return State.ABSENT
        return State.RESIDENT if expert in self.residents else State.LOADING


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheAgainstModel = CacheMachine.TestCase


def full_cache(keys: NDArray[np.float64], count: int) -> ExpertCache:
    """Hold the first `count` experts in as many slots of one device."""
    cache = ExpertCache(SHAPE, [count], lambda incoming, urgent: keys)
    for expert in EXPERTS[:count]:
        cache.reserve(expert, urgent=False)
        cache.loaded(expert)
    return cache


def test_keys_that_are_updated_in_place_count_at_once() -> None:
    keys = np.zeros((3, 4))
    cache = full_cache(keys, 2)
    keys[0, 1] = 1.0
    assert cache.reserve(at(2, 0), urgent=False) == at(0, 1)
    cache.loaded(at(2, 0))
    keys[0, 0], keys[2, 0] = 0.0, 2.0
    assert cache.reserve(at(2, 1), urgent=False) == at(2, 0)


def test_integrity_notices_a_lost_slot() -> None:
    cache = full_cache(np.zeros((3, 4)), 2)
    cache._free[0].append(Slot(0, 0))
    with pytest.raises(AssertionError, match="free"):
        cache.check_integrity()
