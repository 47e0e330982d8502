"""Virtual time, by hand: when gates ask, when links deliver, what a request takes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.costs import Line, LinearCosts
from finemoe.offload.eviction import Recency
from finemoe.offload.policy import ExpertId, LayerOutcome, ModelShape, Need, Placement, Policy
from finemoe.offload.replay import ReplayRuntime
from finemoe.offload.residency import MemoryPlan, Residency
from finemoe.offload.routed import RoutedIteration
from finemoe.offload.runtime import Extra, PredictionCosts, ThreadCosts
from finemoe.offload.timeline import trace_events
from finemoe.offload.virtual_links import LinkRate
from tests.finemoe.offload import states
from tests.finemoe.offload.states import asking

SHAPE = ModelShape(layers=2, experts=4, top_k=1, hidden_size=3)
BYTES, CHUNK = 8, 2


class Scripted(Policy):
    """Requests what the test says, after the gate of layer 0."""

    def __init__(self, requests: dict[tuple[int, int], float], **placement: Any) -> None:
        self.placement = Placement(**placement)
        self.requests = asking(SHAPE, requests) if requests else None
        self.usage = Recency(SHAPE)

    def on_gate(self, iteration: Any, gate: Any) -> Any:
        return None if gate.layer else self.requests

    def on_outcome(self, outcome: LayerOutcome) -> None:
        self.usage.on_outcome(outcome)

    def on_load(self, expert: ExpertId) -> None:
        self.usage.on_load(expert)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Any:
        return self.usage.eviction_keys(incoming, urgent)


def routed(number: int, *activated: tuple[int, ...], tokens: int = 1) -> RoutedIteration:
    return states.routed(SHAPE, number, activated, tokens)


def runtime(
    policy: Policy,
    slots: tuple[int, ...] = (8,),
    rate: LinkRate | None = None,
    gate_s: float = 0.0,
    gate_token_s: float = 0.0,
    parallel: bool = False,
    thread: ThreadCosts | None = None,
    host_s: float = 0.0,
) -> tuple[ReplayRuntime, list[LayerOutcome]]:
    """Return a runtime where a layer takes 10 s before its gate, an expert 1 s, a load 8 s."""
    costs = states.HostCosts(
        start=Line(0.0),
        dense=Line(10.0),
        finish=Line(0.0),
        expert_line=Line(1.0),
        host_line=Line(host_s),
        prediction=PredictionCosts(gate=gate_s, gate_token=gate_token_s),
        parallel=parallel,
        thread=thread or ThreadCosts(),
    )
    residency = Residency(SHAPE, MemoryPlan(slots, BYTES, CHUNK), policy)
    replay = ReplayRuntime(policy, residency, costs, rate or LinkRate(1.0))
    outcomes: list[LayerOutcome] = []
    replay.listeners.append(outcomes.append)
    return replay, outcomes


def test_calls_take_longer_for_every_other_token() -> None:
    costs = PredictionCosts(1.0, 2.0, 3.0, embeddings_token=0.5, gate_token=0.25)
    assert costs.of(1) is costs
    assert costs.of(5) == PredictionCosts(3.0, 3.0, 3.0)
    replay, _ = runtime(Scripted({}, prediction="critical_path"), gate_s=2.0, gate_token_s=4.0)
    # Two layers of 10 to the gate, 2 + 2 * 4 for its three tokens while a load takes 8, and 1.
    assert replay.forward(routed(0, (0,), (1,), tokens=3)) == pytest.approx(2 * 21)


def test_misses_wait_for_the_link_and_hits_do_not() -> None:
    replay, outcomes = runtime(Scripted({}, prediction="none"))
    # 10 to the gate, 8 to load, 1 to compute; twice.
    assert replay.forward(routed(0, (0,), (1,))) == pytest.approx(38)
    assert replay.phases.on_demand_wait == pytest.approx(16)
    assert replay.forward(routed(1, (0,), (1,))) == pytest.approx(38 + 22)
    assert [outcome.hits for outcome in outcomes] == [(), (), (0,), (1,)]


def test_resident_experts_compute_while_missing_ones_arrive() -> None:
    replay, _ = runtime(Scripted({}, prediction="none"))
    replay.forward(routed(0, (0,), (0,)))
    began = replay.now
    # Expert 0 takes 1 s within the 8 s of expert 1's load.
    assert replay.forward(routed(1, (0, 1), (0,))) - began == pytest.approx(10 + 8 + 1 + 11)


PREFETCHED = {
    # The link is free when expert 0 of layer 0 has arrived at 18; the prefetch arrives at 26.
    "in time": ("background", 0.0, 10 + 8 + 1 + 10 + 1, "hits"),
    # The search ends at 24: at the gate of layer 1, at 29, five of eight bytes are there.
    "late, it goes on where it stood": ("background", 14.0, 32 + 1, "late"),
    # The gate's own load runs meanwhile: 10, 14 to predict, 1 to compute, 10, 14, 1.
    "predicted on the critical path": ("critical_path", 14.0, 50, "hits"),
}


@pytest.mark.parametrize("case", PREFETCHED)
def test_a_prefetch_is_there_when_it_was_searched_and_copied(case: str) -> None:
    prediction, gate_s, end, kind = PREFETCHED[case]
    replay, outcomes = runtime(Scripted({(1, 1): 1.0}, prediction=prediction), gate_s=gate_s)
    assert replay.forward(routed(0, (0,), (1,))) == pytest.approx(end)
    assert getattr(outcomes[1], kind) == (1,)


def test_awaited_prefetches_hold_the_layer_until_they_are_there() -> None:
    requests = {(1, j): 1.0 for j in range(4)}
    replay, outcomes = runtime(Scripted(requests, prediction="critical_path", awaited=True))
    # Layer 0 ends when its own expert and then all four are there, at 10 + 8 + 32.
    assert replay.forward(routed(0, (0,), (1,))) == pytest.approx(50 + 10 + 1)
    assert outcomes[1].hits == (1,)
    assert replay.phases.prefetch_wait == pytest.approx(50 - 19)


def test_awaiting_ends_when_no_slot_can_be_had() -> None:
    class Stubborn(Scripted):
        def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Any:
            return np.full((SHAPE.layers, SHAPE.experts), -np.inf)

    requests = {(1, j): 1.0 for j in range(4)}
    replay, _ = runtime(Stubborn(requests, prediction="critical_path", awaited=True), slots=(2,))
    assert replay.forward(routed(0, (0,), (0,))) == pytest.approx(10 + 8 + 8 + 11)


@pytest.mark.parametrize(
    ("in_flight", "lag", "turns"),
    [
        # The prefetch of 3 starts at 25.5; at 29 it is in its second chunk, which ends at 29.5.
        (1, 0.0, 29.5),
        (2, 0.0, 31.5),
        # At 29 it is not settled yet what follows the chunk that ended at 27.5, or the next one.
        (1, 2.0, 27.5),
        (2, 2.0, 29.5),
    ],
)
def test_a_demand_waits_for_the_chunks_in_flight(in_flight: int, lag: float, turns: float) -> None:
    requests = {(1, 3): 1.0}
    rate = LinkRate(1.0, chunks_in_flight=in_flight, lag=lag)
    replay, outcomes = runtime(Scripted(requests, prediction="background"), gate_s=15.5, rate=rate)
    assert replay.forward(routed(0, (0,), (1,))) == pytest.approx(turns + 8 + 1)
    assert outcomes[1].misses == (1,)
    assert replay.residency.traffic().wasted == turns - 25.5


SHARED = LinkRate(1.0, shared_bytes_per_second=1.0)
RATES = {
    "every transfer adds its latency": (
        *(LinkRate(1.0, latency=0.5), (8,), ((0, 1), (0,))),
        10 + 17 + 1 + 10 + 8.5 + 1,
    ),
    # Awake at 10.5, the link brings its two loads by 18.5 and 26.5; the next gate asks at 37.5.
    "an idle link wakes up once for loads that follow one another": (
        *(LinkRate(1.0, wake=0.5), (8,), ((0, 1), (0,))),
        26.5 + 1 + 10 + 8.5 + 1,
    ),
    # Experts 0 and 1 live on two devices: both arrive at 18 and are computed side by side.
    "devices load over their own links": (LinkRate(1.0), (4, 4), ((0, 1), (0, 1)), 2 * 19),
    # Together they get one byte a second: both arrive after 16; alone an expert takes 8.
    "links share the host's bandwidth": (SHARED, (4, 4), ((0, 1), (0,)), 10 + 16 + 1 + 10 + 8 + 1),
    # Device 0 brings experts 0 and 2, device 1 expert 1: half a byte a second each until 26, when
    # 0 and 1 are there, then a whole one for expert 2.
    "a link that stops leaves its share": (SHARED, (4, 4), ((0, 1, 2), (0,)), 26 + 8 + 1 + 19),
}


@pytest.mark.parametrize("case", RATES)
def test_links_take_their_time(case: str) -> None:
    rate, slots, activated, seconds = RATES[case]
    policy = Scripted({}, prediction="none")
    replay, _ = runtime(policy, slots, rate, parallel=len(slots) > 1)
    assert replay.forward(routed(0, *activated)) == pytest.approx(seconds)


class Hosting(Scripted):
    """Has the host compute what is missing of some experts."""

    def __init__(self, *hosted: int) -> None:
        super().__init__({}, prediction="none")
        self.hosted = hosted

    def host_experts(self, need: Need) -> list[int]:
        return [index for index in need.missing if index in self.hosted]


HOSTED = {
    # Expert 0 comes from 10 to 18 and is computed by 19; the host takes 1 and 2 meanwhile.
    "beside device and link": (3.0, (1, 2), LinkRate(1.0), 19.0),
    "one after another": (6.0, (1, 2), LinkRate(1.0), 22.0),
    "alone": (3.0, (0, 1, 2), LinkRate(1.0), 19.0),
    # 8 bytes in 8 s are as much as the link asks for: each gets half, and both have all at 26.
    "at half of the memory's rate": (8.0, (1,), SHARED, 26.0 + 9.0),
    # Two thirds for the host until 22; the link has 4 of 8 bytes by then, and all of them at 26.
    "at two thirds of it": (4.0, (1,), SHARED, 26.0 + 9.0),
}


@pytest.mark.parametrize("case", HOSTED)
def test_the_host_computes_beside_device_and_link(case: str) -> None:
    seconds, hosted, rate, end = HOSTED[case]
    replay, outcomes = runtime(Hosting(*hosted), rate=rate, host_s=seconds)
    # What is neither resident nor the host's comes after expert 0, in 8 s.
    assert replay.forward(routed(0, (0, 1, 2), ())) == pytest.approx(end + 10)
    assert outcomes[0].host == hosted
    assert replay.residency.cache.occupied == 3 - len(hosted)


def test_a_prefetch_wakes_an_idle_link_and_keeps_a_busy_one_awake() -> None:
    requests = {(1, 1): 1.0, (1, 2): 0.5}
    policy = Scripted(requests, prediction="background")
    replay, outcomes = runtime(policy, gate_s=8.75, rate=LinkRate(1.0, wake=0.5))
    # Expert 0 is there at 18.5; the search ends at 18.75, so its loads run from 19.25 to 27.25 and
    # from there to 35.25, when the gate of layer 1, asked at 29.5, goes on.
    assert replay.forward(routed(0, (0,), (1, 2))) == pytest.approx(35.25 + 1)
    assert outcomes[1].hits == (1,)
    assert outcomes[1].late == (2,)


def test_a_waiting_model_resumes_late_and_its_link_goes_on_meanwhile() -> None:
    thread = ThreadCosts(resume=0.25)
    replay, _ = runtime(Scripted({}, prediction="none"), thread=thread)
    # The second load is there at 26 nevertheless; the last one comes from 37.25 to 45.25.
    assert replay.forward(routed(0, (0, 1), (0,))) == pytest.approx(26.25 + 1 + 10 + 8.25 + 1)
    assert replay.phases.on_demand_wait == pytest.approx(8.25 + 7 + 8.25)
    # Hits wait for nothing.
    assert replay.forward(routed(1, (0,), (0,))) == pytest.approx(46.5 + 22)


def test_parts_take_longer_after_a_wait_and_beside_a_copy() -> None:
    thread = ThreadCosts(dense=Extra(2.0, 0.5), expert=Extra(0.25, 0.125))
    replay, _ = runtime(Scripted({}, prediction="none"), thread=thread)
    # Expert 0 from 18 to 19.375, beside the load of 1, which is computed from 26 to 27.25.
    assert replay.forward(routed(0, (0, 1), (0,))) == pytest.approx(27.25 + 12 + 8 + 1.25)
    # Only what comes first after a wait is slowed down by it: here the dense part.
    assert replay.forward(routed(1, (0,), (0,))) == pytest.approx(48.5 + 12 + 1 + 10 + 1)


def test_a_timeline_holds_what_happened(tmp_path: Path) -> None:
    policy = Scripted({}, prediction="none")
    costs = LinearCosts(Line(0.0), Line(10.0), Line(0.0), Line(1.0))
    residency = Residency(SHAPE, MemoryPlan((8,), BYTES, CHUNK), policy)
    with trace_events(str(tmp_path), wanted=True) as timeline:
        replay = ReplayRuntime(policy, residency, costs, LinkRate(1.0), timeline)
        replay.forward(routed(0, (0,), (1,)))
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    seconds = {(e["cat"], e["name"]): (e["ts"] / 1e6, e["dur"] / 1e6) for e in spans}
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert all(named[event["tid"]] == event["cat"] for event in spans)
    assert seconds[("link 0", "on demand 0.0")] == (10, 8)
    assert seconds[("waits", "on demand")] == (29, 8)
    assert seconds[("iterations", "decode")] == (0, 38)
