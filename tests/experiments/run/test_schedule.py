"""Schedules: conservation in virtual time, and the same tokens live as alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.on_demand import OnDemandPolicy
from experiments.errors import UserError
from experiments.run import live
from experiments.run.live import LiveBackend, LogitsLog
from experiments.run.models import FAMILIES, random_model
from experiments.run.schedule import (
    ContinuousBatches,
    FixedBatches,
    Request,
    Schedule,
    Served,
    Server,
    Step,
)
from finemoe.assemble import resident_runtime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Iteration, Placement
from tests.architectures import small_config
from tests.engine import Clock, offloaded, offloading

CPU = torch.device("cpu")


def request(number: int, arrival: float, output_tokens: int, input_tokens: int = 3) -> Request:
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(128, (input_tokens,), generator=generator).tolist()
    return Request(number, tuple(prompt), output_tokens, arrival)


@dataclass
class Hours:
    """A backend whose steps take the time that it is told, and compute nothing."""

    takes: Callable[[Step], float]
    now: float = 0.0
    steps: list[tuple[Step, float, float]] = field(default_factory=list)
    """Each with its begin and end."""

    def forward(self, step: Step) -> None:
        begin = self.now
        self.now += self.takes(step)
        self.steps.append((step, begin, self.now))

    def wait(self, until: float) -> None:
        self.now = until

    def end_request(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return request.prompt, (0,) * request.output_tokens

    def drain(self) -> None:
        pass

    def shown(self) -> list[tuple[float, str, tuple[int, ...], tuple[int, ...]]]:
        return [(t, one.phase, one.iteration.requests, one.generated) for one, t, _ in self.steps]


def lengths(prefill: float, decode: float) -> Callable[[Step], float]:
    return lambda step: prefill if step.phase == "prefill" else decode


def test_continuous_batches_worked_out_by_hand() -> None:
    requests = [request(7, 1.0, 3), request(8, 1.5, 1), request(9, 2.5, 2), request(6, 20.0, 1)]
    backend = Hours(lengths(2.0, 1.0))
    server = Server(backend, iterations=5)
    served = list(server.serve(ContinuousBatches(requests, 2)))
    assert backend.shown() == [
        (1.0, "prefill", (7,), (0,)),
        (3.0, "prefill", (8,), (0,)),  # leaves at once, which makes room for 9
        (5.0, "prefill", (9,), (0,)),
        (7.0, "decode", (7, 9), (1, 1)),  # 9 leaves
        (8.0, "decode", (7,), (2,)),
        (20.0, "prefill", (6,), (0,)),
    ]
    assert server.busy_seconds == 8.0 + 2.0
    started = sorted(served, key=lambda one: one.batch)
    assert [one.request.number for one in started] == [7, 8, 9, 6]
    assert [one.queueing for one in started] == [0.0, 1.5, 2.5, 0.0]
    assert [one.token_times for one in started] == [[2.0, 7.0, 8.0], [3.5], [4.5, 5.5], [2.0]]
    assert [one.iterations for one in started] == [[5, 8, 9], [6], [7, 8], [10]]


def test_fixed_batches_worked_out_by_hand() -> None:
    requests = [Request(number, (1, 2), 2) for number in range(3)]
    backend = Hours(lengths(3.0, 1.0), now=10.0)
    server = Server(backend, batches=4)
    served = list(server.serve(FixedBatches(requests, 2)))
    assert backend.shown() == [
        (10.0, "prefill", (0, 1), (0, 0)),
        (13.0, "decode", (0, 1), (1, 1)),
        (14.0, "prefill", (2,), (0,)),
        (17.0, "decode", (2,), (1,)),
    ]
    assert [(one.request.number, one.batch) for one in served] == [(0, 4), (1, 4), (2, 5)]
    # Who arrives when the prefill begins does not queue.
    assert [(one.token_times, one.queueing) for one in served] == [([3.0, 4.0], 0.0)] * 3
    assert [one.iterations for one in served] == [[0, 1], [0, 1], [2, 3]]
    assert (server.batches, server.iterations, server.busy_seconds) == (6, 4, 8.0)


arrivals = st.floats(0, 20) | st.integers(0, 5).map(float)
loads = st.lists(st.tuples(arrivals, st.integers(1, 5)), min_size=1, max_size=12)


@given(loads, st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_schedule_conserves(load: list[tuple[float, int]], room: int, durations: Any) -> None:
    requests = [request(number, *one) for number, one in enumerate(load)]
    backend = Hours(lambda step: durations.choice([0.001, 0.4, 3.0]))
    served = list(Server(backend).serve(ContinuousBatches(requests, room)))
    seen = backend.steps
    # Every request served once, with exactly its tokens, and none before its arrival.
    assert sorted(one.request.number for one in served) == list(range(len(requests)))
    made = Counter(number for step, *_ in seen for number in step.iteration.requests)
    assert made == {one.number: one.output_tokens for one in requests}
    for one in served:
        assert len(one.token_times) == len(one.iterations) == one.request.output_tokens
        assert one.queueing >= 0
        assert one.token_times[0] > one.queueing - 1e-9
        assert one.token_times == sorted(one.token_times)
    # First come, first served.
    order = sorted(requests, key=lambda one: (one.arrival, one.number))
    assert [one.request for one in sorted(served, key=lambda one: one.batch)] == order
    check_borders(requests, room, seen)


def check_borders(
    requests: list[Request], room: int, seen: list[tuple[Step, float, float]]
) -> None:
    """Recompute who waits and who runs at every border from the steps before it."""
    made: Counter[int] = Counter()
    last_end = 0.0
    for number, (step, begin, end) in enumerate(seen):
        left = [one for one in requests if made[one.number] < one.output_tokens]
        here = [one for one in left if (one.arrival or 0.0) <= begin]
        running = [one for one in here if made[one.number]]
        waiting = [one for one in here if not made[one.number]]
        assert step.number == number
        earliest = min(one.arrival or 0.0 for one in left)
        assert begin == max(last_end, earliest), "idle though one waits"
        if waiting and len(running) < room:
            assert step.phase == "prefill"
            assert len(step.requests) == 1
            assert step.requests[0] in waiting
        else:
            assert step.phase == "decode"
            assert set(step.iteration.requests) == {one.number for one in running}
        assert len(step.requests) <= room
        assert step.generated == tuple(made[one.number] for one in step.requests)
        made.update(step.iteration.requests)
        last_end = end


class Watch(OnDemandPolicy):
    """Notes the rows that reach the embedding, and the requests that end."""

    def __init__(self, model: OffloadedModel) -> None:
        super().__init__(model.shape)
        self.placement = Placement("background")
        self.rows: list[tuple[Iteration, int]] = []
        self.ended: list[int] = []

    def on_embeddings(self, iteration: Iteration, embeddings: Any) -> None:
        self.rows.append((iteration, len(embeddings)))

    def on_gate(self, iteration: Iteration, gate: Any) -> None:
        self.rows.append((iteration, len(gate.probabilities)))

    def end_request(self, request: int) -> None:
        self.ended.append(request)


LOAD = (
    request(0, 0.0, 9, input_tokens=4),
    request(1, 0.0, 3, input_tokens=17),  # the longest leaves first
    request(2, 0.05, 1, input_tokens=2),
    request(3, 0.05, 12, input_tokens=1),
    request(4, 0.06, 5, input_tokens=11),
    request(5, 9.0, 3, input_tokens=6),  # alone again
)


def served(runtime: Any, schedule: Schedule) -> tuple[dict[int, Served], list[Step]]:
    """Serve in pretended time; return what requests got, and the steps."""
    steps = list[Step]()
    server = Server(LiveBackend(runtime), listeners=[steps.append])
    with patch.object(live, "time", Clock(look=0.01)):
        return {one.request.number: one for one in server.serve(schedule)}, steps


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, {}) for family in FAMILIES),
        ("gpt_oss", {"sliding_window": 8}),
        ("mixtral", {"sliding_window": 8}),
    ],
)
def test_requests_get_the_same_tokens_as_alone(family: str, config: dict[str, Any]) -> None:
    model = offloaded(family, torch.float32, **config)
    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        alone, _ = served(runtime, FixedBatches(LOAD, 1))
        together, steps = served(runtime, ContinuousBatches(LOAD, 3))
    assert len(set(alone[3].tokens)) > 2, "a model that repeats itself shows nothing"
    assert all(together[number].tokens == one.tokens for number, one in alone.items())
    sizes = {len(step.requests) for step in steps if step.phase == "decode"}
    assert sizes == {1, 2, 3}


@pytest.mark.parametrize("kind", ["jamba", "deepseek_v32"])
def test_caches_that_cannot_be_joined_are_refused(kind: str) -> None:
    model = OffloadedModel.from_model(random_model(small_config(kind), torch.float32, 0), CPU)
    with resident_runtime(model, OnDemandPolicy(model.shape)) as runtime:
        served(runtime, FixedBatches(LOAD[:2], 1))
        with pytest.raises(UserError, match=r"cannot share a .*Layer .*; use workload=offline"):
            served(runtime, ContinuousBatches(LOAD, 3))


def test_no_padding_reaches_a_router_and_requests_end_when_they_leave() -> None:
    model = offloaded("mixtral", torch.float32)
    watch = Watch(model)
    with offloading(model, watch, (6,)) as runtime:
        _, steps = served(runtime, ContinuousBatches(LOAD, 3))
        runtime.drain()
    assert len(watch.rows) == len(steps) * (1 + model.shape.layers)
    for iteration, rows in watch.rows:
        assert rows == sum(iteration.tokens)
        assert iteration.phase == "prefill" or rows == len(iteration.requests)
    assert sorted(watch.ended) == list(range(len(LOAD)))
    assert watch.ended == [one.number for step in steps for one in step.leaving]


def test_a_wrong_logit_is_noticed() -> None:
    step, right, wrong = Step(0, "prefill", LOAD[2:3], (0,)), torch.zeros(1, 8), torch.ones(1, 8)
    log = LogitsLog()
    log.keep(step, right)
    log.compare(step, right.clone())
    assert log.same
    log.compare(step, wrong)
    assert not log.same
