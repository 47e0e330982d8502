"""Our cache under LRU, LFU and Belady against an independent simulator, libCacheSim.

Requests come one at a time and every expert has unit size, so both sides must agree on every hit.
Their LFUs differ in one rule. Both break ties of frequency by recency (libCacheSim appends an
object to the list of its new frequency and evicts from the head), but it forgets the frequency of
what it evicts (libCacheSim/cache/eviction/LFU.c), while `LfuPolicy` counts on unless it is told to
forget. So LFU is compared forgetting, and a stream worked out by hand shows where remembering makes
a difference.
"""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.belady import BeladyPolicy
from baselines.lfu import LfuPolicy
from baselines.on_demand import OnDemandPolicy
from finemoe.offload.cache import NO_SLOT, ExpertCache
from finemoe.offload.policy import ExpertId, Iteration, LayerOutcome, ModelShape, Policy
from tests.finemoe.offload.states import State, state

libcachesim = pytest.importorskip("libcachesim", reason="pip install libcachesim")

SHAPE = ModelShape(layers=3, experts=5, top_k=1, hidden_size=1)
NEVER = 2**63 - 1

Stream = Sequence[ExpertId]


def our_hits(stream: Stream, shape: ModelShape, slots: int, policy: Policy) -> list[bool]:
    """Return which requests of a stream our cache has, serving one expert at a time.

    Each request is an iteration in which only one layer uses an expert.
    """
    cache = ExpertCache(shape, (slots,), policy.eviction_keys, policy.on_evict)
    hits = []
    for number, expert in enumerate(stream):
        flat = expert.layer * shape.experts + expert.index
        hit = state(cache, flat) is State.RESIDENT
        iteration = Iteration(number, "decode", (0,), (1,))
        found = (expert.index,)
        kinds = (found, (), ()) if hit else ((), (), found)
        policy.on_outcome(LayerOutcome(iteration, expert.layer, *kinds))
        if not hit:
            assert cache.reserve(flat, urgent=True) != NO_SLOT
            cache.loaded(flat)
            policy.on_load(expert)
        hits.append(hit)
    cache.check_integrity()
    return hits


def routing_of(stream: Stream, shape: ModelShape) -> list[list[tuple[int, ...]]]:
    layers = range(shape.layers)
    return [[(e.index,) if layer == e.layer else () for layer in layers] for e in stream]


def belady(shape: ModelShape, stream: Stream) -> Policy:
    policy = BeladyPolicy(shape)
    policy.set_future_routing(routing_of(stream, shape))
    return policy


def their_hits(stream: Stream, shape: ModelShape, slots: int, algorithm: str) -> list[bool]:
    cache = getattr(libcachesim, algorithm)(cache_size=slots, hashpower=10)
    following: list[int] = []
    known: dict[ExpertId, int] = {}
    for number in reversed(range(len(stream))):
        following.append(known.get(stream[number], NEVER))
        known[stream[number]] = number
    hits = []
    for number, (expert, next_use) in enumerate(zip(stream, reversed(following), strict=True)):
        request = libcachesim.Request()
        request.obj_id = expert.layer * shape.experts + expert.index + 1
        request.obj_size, request.clock_time = 1, number
        request.next_access_vtime = next_use
        hits.append(bool(cache.get(request)))
    return hits


Make = Callable[[ModelShape, Stream], Policy]
PAIRS: dict[str, Make] = {
    "LRU": lambda shape, _: OnDemandPolicy(shape),
    "LFU": lambda shape, _: LfuPolicy(shape, "forgotten"),
    "Belady": belady,
}


@pytest.mark.parametrize("algorithm", PAIRS)
@settings(max_examples=60)
@given(
    st.lists(st.builds(ExpertId, st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=80),
    st.integers(1, 8),
)
def test_random_streams_hit_alike(algorithm: str, stream: list[ExpertId], slots: int) -> None:
    theirs = their_hits(stream, SHAPE, slots, algorithm)
    assert our_hits(stream, SHAPE, slots, PAIRS[algorithm](SHAPE, stream)) == theirs


def test_lfu_differs_by_what_it_remembers_of_evicted_experts() -> None:
    a, b, c = (ExpertId(0, index) for index in range(3))
    # Two slots. After five requests a was visited twice and b three times, so c takes a's slot.
    stream = [a, a, b, b, b, c, a, c, a]
    # Forgetting: c, with one visit, leaves for a, which has one again, and so they alternate.
    assert their_hits(stream, SHAPE, 2, "LFU") == [False, True, False, True, True, *[False] * 4]
    # Remembering: a comes back for c, with its third visit. Then c comes for b, which has three
    # visits too but is less recent, and a is still there.
    ours = our_hits(stream, SHAPE, 2, LfuPolicy(SHAPE))
    assert ours == [False, True, False, True, True, False, False, False, True]
