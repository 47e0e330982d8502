"""The live runtime: failures surface, threads end, predictions run where they are placed."""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from baselines.on_demand import OnDemandPolicy
from experiments.run.testbeds import cores_apart
from finemoe.offload.live import LiveRuntime, Worker
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import (
    ExpertId,
    Gate,
    Iteration,
    LayerOutcome,
    ModelShape,
    Placement,
    Policy,
)
from tests.engine import emulated, offloaded, offloading
from tests.finemoe.offload.states import asking

affinity: Callable[[int], set[int]] = getattr(os, "sched_getaffinity", lambda _: set())
PROMPT = torch.tensor([[1, 2, 3, 4, 5]])
PREFILL = Iteration(0, "prefill", (0,), (5,))


@pytest.fixture
def model() -> OffloadedModel:
    return offloaded()


def runtime(
    model: OffloadedModel, policy: Policy, slots: int = 6, cores: Any = None, devices: int = 1
) -> LiveRuntime:
    testbed = replace(emulated(devices), cores=cores)
    return offloading(model, policy, (slots,) * devices, testbed=testbed)


def serve_and_drain(live: LiveRuntime) -> None:
    live.forward(PREFILL, input_ids=PROMPT)
    live.drain()


class Spy(OnDemandPolicy):
    """Notes what it is told, and by which thread on which cores; may act on it."""

    def __init__(self, shape: ModelShape, prediction: Any = "background", **how: Any) -> None:
        super().__init__(shape)
        self.placement = Placement(prediction, **how)
        self.calls: list[tuple[str, str]] = []
        self.cores: dict[str, set[int]] = {}
        self.gates: list[Gate] = []
        self.outcomes: list[LayerOutcome] = []
        self.act: Callable[[Gate], Any] = lambda gate: None

    def _note(self, call: str = "") -> None:
        thread = threading.current_thread().name
        self.cores[thread] = affinity(0)
        if call:
            self.calls.append((call, thread))

    def on_embeddings(self, iteration: Iteration, embeddings: Any) -> None:
        self._note(f"embeddings {embeddings.shape}")

    def on_gate(self, iteration: Iteration, gate: Gate) -> Any:
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
def test_predictions_run_where_placed(model: OffloadedModel, prediction: str, thread: str) -> None:
    spy = Spy(model.shape, prediction, hidden_states=True)
    with runtime(model, spy) as live:
        serve_and_drain(live)
    calls = ["embeddings (5, 32)", "gate 0", "gate 1", "gate 2", "end"]
    assert spy.calls == [(call, thread) for call in calls]
    for gate, outcome in zip(spy.gates, spy.outcomes, strict=True):
        assert gate.probabilities.shape == (5, 4)
        assert np.allclose(gate.probabilities.sum(axis=1), 1, atol=1e-5)
        assert getattr(gate.hidden_states, "shape", None) == (5, 32)
        chosen = np.argsort(-gate.probabilities, axis=1)[:, :2]
        assert gate.activated == outcome.activated == tuple(np.unique(chosen).tolist())


@pytest.mark.skipif(len(affinity(0)) < 2, reason="no two cores to choose from")
def test_links_and_searcher_keep_off_the_cores_of_the_model(model: OffloadedModel) -> None:
    before = affinity(0)
    policy, (own, beside) = Spy(model.shape), cores_apart(1)
    with runtime(model, policy, cores=(own, beside)) as live:
        serve_and_drain(live)
    assert own | beside == before == affinity(0)
    assert policy.cores == {"MainThread": own, "link-0": beside, "searcher": beside}


GUARDED = ("begin_iteration", "gate", "prefetch", "arrived", "release", "next_chunk", "chunk_done")


@pytest.mark.parametrize("prediction", ["background", "critical_path"])
def test_shared_state_is_locked(model: OffloadedModel, prediction: str, monkeypatch: Any) -> None:
    policy = Spy(model.shape, prediction, awaited=True)
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


def test_an_expert_that_no_link_can_bring_is_an_error_at_once(model: OffloadedModel) -> None:
    with runtime(model, OnDemandPolicy(model.shape), slots=4) as live:
        serve_and_drain(live)
        with live._lock:
            for flat in range(model.shape.size):
                live.residency.cache.pin(flat)
        with pytest.raises(RuntimeError, match="waits for an expert that no link can bring"):
            live.forward(Iteration(1, "prefill", (0,), (5,)), input_ids=PROMPT)


def leaves_nothing(model: OffloadedModel, threads: set[threading.Thread]) -> None:
    assert set(threading.enumerate()) == threads
    assert not any(module._forward_hooks for module in model.model.modules())
    with runtime(model, OnDemandPolicy(model.shape)) as live:
        serve_and_drain(live)
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failing_start_leaves_nothing(model: OffloadedModel, monkeypatch: Any, nth: int) -> None:
    started: list[threading.Thread] = []
    before, start = set(threading.enumerate()), threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if len(started) == nth - 1:
            raise KeyboardInterrupt
        started.append(thread)
        start(thread)

    policy = Spy(model.shape)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(KeyboardInterrupt), runtime(model, policy, slots=5, devices=2):
            pytest.fail("entered")
    leaves_nothing(model, before)


def test_an_interrupted_exit_undoes_everything(model: OffloadedModel, monkeypatch: Any) -> None:
    interrupts = iter([KeyboardInterrupt])
    before, join = set(threading.enumerate()), threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        for interrupt in interrupts:
            raise interrupt
        join(thread, timeout)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(threading.Thread, "join", interrupted)
        with runtime(model, Spy(model.shape), 5, devices=2) as live:
            serve_and_drain(live)
    leaves_nothing(model, before)


def test_a_full_queue_makes_the_publisher_wait() -> None:
    release, errors, done = threading.Event(), list[BaseException](), list[int]()
    worker = Worker(2, errors.append)
    worker.start()
    for task in (partial(release.wait, 10), partial(done.append, 0), partial(done.append, 1)):
        worker.publish(task)
    last = partial(worker.publish, partial(done.append, 2))
    publishing = threading.Thread(target=last, daemon=True)
    publishing.start()
    publishing.join(0.1)
    assert publishing.is_alive()
    release.set()
    publishing.join(10)
    worker.drain()
    assert (done, errors) == ([0, 1, 2], [])
    worker.close()


def test_after_its_first_error_the_searcher_drops_tasks_and_blocks_nobody() -> None:
    errors, done = list[BaseException](), list[int]()
    worker = Worker(1, errors.append)
    worker.start()
    for task in (partial(done.append, 0), sys.exit, *(partial(done.append, 1),) * 100, sys.exit):
        worker.publish(task)
    worker.drain()
    worker.close()
    assert (done, [type(one) for one in errors]) == ([0], [SystemExit])
