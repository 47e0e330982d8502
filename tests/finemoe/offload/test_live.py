"""The live runtime: failures surface, threads end, predictions run where they are placed."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from baselines.on_demand import OnDemandPolicy
from experiments.run.testbeds import cores_apart
from finemoe.assemble import offloading_runtime
from finemoe.offload.live import LiveRuntime, Worker
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Iteration,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
    Priorities,
)
from tests.engine import emulated, offloaded
from tests.finemoe.offload.states import asking

affinity: Callable[[int], set[int]] = getattr(os, "sched_getaffinity", lambda _: set())
PROMPT = torch.tensor([[1, 2, 3, 4, 5]])
PREFILL = Iteration(0, "prefill", (0,), (5,))


@pytest.fixture
def model() -> OffloadedModel:
    return offloaded()


def runtime(
    model: OffloadedModel,
    policy: Policy,
    slots: int = 6,
    cores: tuple[frozenset[int], frozenset[int]] | None = None,
    devices: int = 1,
) -> LiveRuntime:
    testbed = replace(emulated(devices), cores=cores)
    stored = model.store.layout.nbytes
    return offloading_runtime(model, policy, testbed, (slots,) * devices, stored)


def serve_and_drain(live: LiveRuntime) -> None:
    live.forward(PREFILL, input_ids=PROMPT)
    live.drain()


class Spy(OnDemandPolicy):
    """Notes what it is told, and by which thread on which cores; may act on it."""

    def __init__(self, shape: ModelShape, placement: Placement) -> None:
        super().__init__(shape)
        self.placement = placement
        self.calls: list[tuple[str, str]] = []
        self.cores: dict[str, set[int]] = {}
        self.gates: list[Gate] = []
        self.outcomes: list[LayerOutcome] = []
        self.act: Callable[[Gate], Priorities | None] = lambda gate: None

    def _note(self, call: str = "") -> None:
        thread = threading.current_thread().name
        self.cores[thread] = affinity(0)
        if call:
            self.calls.append((call, thread))

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> None:
        self._note(f"embeddings {embeddings.shape}")

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        self._note(f"gate {gate.layer}")
        self.gates.append(gate)
        return self.act(gate)

    def end_iteration(self, iteration: Iteration) -> None:
        self._note("end")

    def on_load(self, expert: ExpertId) -> None:
        super().on_load(expert)
        self._note()

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        self._note()
        self.outcomes.append(outcome)


@pytest.mark.parametrize(
    ("prediction", "thread"), [("background", "searcher"), ("critical_path", "MainThread")]
)
def test_predictions_run_in_order_where_they_are_placed(
    model: OffloadedModel, prediction: str, thread: str
) -> None:
    spy = Spy(model.shape, Placement(prediction, hidden_states=True))  # type: ignore[arg-type]
    with runtime(model, spy) as live:
        serve_and_drain(live)
    calls = ["embeddings (5, 32)", "gate 0", "gate 1", "gate 2", "end"]
    assert spy.calls == [(call, thread) for call in calls]
    for gate, outcome in zip(spy.gates, spy.outcomes, strict=True):
        assert gate.probabilities.shape == (5, 4)
        assert np.allclose(gate.probabilities.sum(axis=1), 1, atol=1e-5)
        assert gate.hidden_states is not None
        assert gate.hidden_states.shape == (5, 32)
        chosen = np.argsort(-gate.probabilities, axis=1)[:, :2]
        assert gate.activated == outcome.activated == tuple(np.unique(chosen).tolist())


@pytest.mark.skipif(len(affinity(0)) < 2, reason="no two cores to choose from")
def test_links_and_searcher_keep_off_the_cores_of_the_model(model: OffloadedModel) -> None:
    before = affinity(0)
    policy, (own, beside) = Spy(model.shape, Placement("background")), cores_apart(1)
    with runtime(model, policy, cores=(own, beside)) as live:
        serve_and_drain(live)
    assert own | beside == before == affinity(0)
    assert policy.cores == {"MainThread": own, "link-0": beside, "searcher": beside}


GUARDED = ("begin_iteration", "gate", "prefetch", "arrived", "release", "next_chunk", "chunk_done")


@pytest.mark.parametrize("prediction", ["background", "critical_path"])
def test_what_two_threads_touch_is_touched_under_the_lock(
    model: OffloadedModel, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Spy(model.shape, Placement(prediction, awaited=True))  # type: ignore[arg-type]
    policy.act = lambda gate: None if gate.layer else asking(model.shape, {(2, 0): 1.0})
    live = runtime(model, policy, slots=1, devices=2)
    calls: set[str] = set()

    class Watched:
        """The residency, whose every change needs the lock."""

        def __getattr__(self, name: str) -> object:
            real = getattr(residency, name)
            return partial(self._call, name, real) if name in GUARDED else real

        def _call(self, name: str, real: Callable[..., object], *given: object) -> object:
            calls.add(name)
            assert live._lock._is_owned(), name  # type: ignore[attr-defined]
            return real(*given)

    residency, live.residency = live.residency, Watched()  # type: ignore[assignment]
    with live:
        for number in range(2):
            live.forward(Iteration(number, "prefill", (0,), (5,)), input_ids=PROMPT)
        live.drain()
    assert calls >= set(GUARDED)


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(serve: Callable[[], None]) -> Exception | None:
    """Return the error with which serving ends, if it has one; it must not hang."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            serve()
        except Exception as error:
            errors.append(error)

    thread = in_thread(run)
    thread.join(30)
    assert not thread.is_alive()
    return errors[0] if errors else None


def test_an_expert_that_no_link_can_bring_is_an_error_at_once(model: OffloadedModel) -> None:
    def serve() -> None:
        with runtime(model, OnDemandPolicy(model.shape), slots=4) as live:
            serve_and_drain(live)
            with live._lock:
                for flat in range(model.shape.size):
                    live.residency.cache.pin(flat)
            live.forward(Iteration(1, "prefill", (0,), (5,)), input_ids=PROMPT)

    assert "waits for an expert that no link can bring" in str(ended(serve))


def leaves_nothing(model: OffloadedModel, threads: set[threading.Thread]) -> None:
    assert set(threading.enumerate()) == threads
    assert not any(module._forward_hooks for module in model.model.modules())
    with runtime(model, OnDemandPolicy(model.shape)) as live:
        serve_and_drain(live)
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_thread_that_fails_to_start_leaves_nothing_behind(
    model: OffloadedModel, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    started: list[threading.Thread] = []
    before, start = set(threading.enumerate()), threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if len(started) == nth - 1:
            raise KeyboardInterrupt
        started.append(thread)
        start(thread)

    policy = Spy(model.shape, Placement("background"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(KeyboardInterrupt), runtime(model, policy, slots=5, devices=2):
            pytest.fail("entered")
    leaves_nothing(model, before)


def test_an_interrupt_of_the_exit_comes_when_everything_is_undone(
    model: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = iter([KeyboardInterrupt])
    before, join = set(threading.enumerate()), threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        for interrupt in interrupts:
            raise interrupt
        join(thread, timeout)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(threading.Thread, "join", interrupted)
        with runtime(model, Spy(model.shape, Placement("background")), 5, devices=2) as live:
            serve_and_drain(live)
    leaves_nothing(model, before)


def started(capacity: int, errors: list[BaseException]) -> Worker:
    worker = Worker(capacity, errors.append)
    worker.start()
    return worker


def test_a_full_queue_makes_the_publisher_wait() -> None:
    release, errors, done = threading.Event(), list[BaseException](), list[int]()
    worker = started(2, errors)
    for task in (partial(release.wait, 10), partial(done.append, 0), partial(done.append, 1)):
        worker.publish(task)
    publishing = in_thread(partial(worker.publish, partial(done.append, 2)))
    publishing.join(0.1)
    assert publishing.is_alive()
    release.set()
    publishing.join(10)
    worker.drain()
    assert (done, errors) == ([0, 1, 2], [])
    worker.close()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_after_its_first_error_the_searcher_drops_tasks_and_blocks_nobody(
    error: type[BaseException],
) -> None:
    errors: list[BaseException] = []
    done: list[int] = []

    def fail() -> None:
        raise error

    def publish_many() -> None:
        for task in (partial(done.append, 0), fail, *(partial(done.append, 1),) * 100, fail):
            worker.publish(task)
        worker.drain()
        worker.close()

    worker = started(1, errors)
    publisher = in_thread(publish_many)
    publisher.join(10)
    assert not publisher.is_alive()
    assert done == [0]
    assert [type(one) for one in errors] == [error]
