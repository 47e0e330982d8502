"""The live runtime: failures surface, threads end, predictions run where they are placed."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from baselines.on_demand import OnDemandPolicy
from experiments.small_models import small_model
from finemoe.assemble import offloading_runtime
from finemoe.offload.cores import Cores
from finemoe.offload.links import EmulatedLink
from finemoe.offload.live import BackgroundError, LiveRuntime
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
    Prefetch,
)
from finemoe.offload.transfer import Chunk
from finemoe.policy import FineMoEOptions, FineMoEPolicy
from finemoe.testbed import Testbed

PROMPT = torch.tensor([[1, 2, 3, 4, 5]])
PREFILL = Iteration(0, "prefill", (0,), (5,))


@pytest.fixture
def model() -> OffloadedModel:
    return OffloadedModel.from_model(small_model("mixtral"), torch.device("cpu"))


def runtime(
    model: OffloadedModel, policy: Policy, slots: int = 6, cores: Cores | None = None
) -> LiveRuntime:
    cpu = (torch.device("cpu"),)
    testbed = Testbed("test", "emulated", cpu, chunk_bytes=2048, link_gb_s=0.5, cores=cores)
    stored = model.store.layout.nbytes
    return offloading_runtime(model, policy, testbed, (slots,), stored)


def serve_and_drain(live: LiveRuntime) -> None:
    live.forward(PREFILL, input_ids=PROMPT)
    live.drain()


class Spy(OnDemandPolicy):
    """Notes what it is told and by which thread, and may act on it."""

    def __init__(self, shape: ModelShape, placement: Placement) -> None:
        super().__init__(shape)
        self.placement = placement
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.gates: list[Gate] = []
        self.outcomes: list[LayerOutcome] = []
        self.act: Callable[[], Sequence[Prefetch]] = tuple

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Sequence[Prefetch]:
        self._note(f"embeddings {embeddings.shape}")
        return ()

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        self._note(f"gate {gate.layer}")
        self.gates.append(gate)
        return self.act() if gate.layer == 0 else ()

    def end_iteration(self, iteration: Iteration) -> Sequence[Prefetch]:
        self._note("end")
        return ()

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
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
    assert spy.calls == ["embeddings (5, 32)", "gate 0", "gate 1", "gate 2", "end"]
    assert spy.threads == {thread}
    for gate, outcome in zip(spy.gates, spy.outcomes, strict=True):
        assert gate.probabilities.shape == (5, 4)
        assert np.allclose(gate.probabilities.sum(axis=1), 1, atol=1e-5)
        assert gate.hidden_states is not None
        assert gate.hidden_states.shape == (5, 32)
        chosen = np.argsort(-gate.probabilities, axis=1)[:, :2]
        assert gate.activated == outcome.activated == tuple(np.unique(chosen).tolist())


class Placed(Spy):
    """Notes which cores each thread may use."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape, Placement("background"))
        self.cores: dict[str, set[int]] = {}

    def _note(self, call: str) -> None:
        self.cores[threading.current_thread().name] = os.sched_getaffinity(0)

    def on_load(self, expert: ExpertId) -> None:
        super().on_load(expert)
        self._note("load")

    def on_outcome(self, outcome: LayerOutcome) -> None:
        super().on_outcome(outcome)
        self._note("outcome")


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="no two cores to choose from",
)
def test_links_and_searcher_keep_off_the_cores_of_the_model(model: OffloadedModel) -> None:
    before = os.sched_getaffinity(0)
    policy, cores = Placed(model.shape), Cores.apart(1)
    with runtime(model, policy, cores=cores) as live:
        serve_and_drain(live)
    assert policy.cores == {
        "MainThread": cores.model,
        "link-0": cores.beside,
        "searcher": cores.beside,
    }
    assert os.sched_getaffinity(0) == before


def test_a_policy_without_predictions_is_not_shown_any_context(model: OffloadedModel) -> None:
    spy = Spy(model.shape, Placement("none"))
    with runtime(model, spy) as live:
        live.forward(PREFILL, input_ids=PROMPT)
        assert live.phases.context_collection == 0
    assert spy.calls == []
    assert len(spy.outcomes) == model.shape.layers


class NextLayer(OnDemandPolicy):
    """Prefetches one expert of layer 1 while layer 0 holds every slot."""

    placement = Placement("critical_path")

    def on_gate(self, iteration: Iteration, gate: Gate) -> Sequence[Prefetch]:
        return [Prefetch(ExpertId(1, 0), 1.0)] if gate.layer == 0 else ()


def test_a_prefetch_that_waits_for_a_slot_starts_when_a_layer_is_done(
    model: OffloadedModel,
) -> None:
    live = runtime(model, NextLayer(model.shape), slots=2)
    arrived: list[bool] = []

    def await_prefetch(*_: object) -> None:
        def resident() -> bool:
            return live.residency.cache.is_resident(live.model.shape.place(ExpertId(1, 0)))

        with live._changed:
            arrived.append(live._changed.wait_for(resident, timeout=10))

    hook = model.gates[1].register_forward_pre_hook(await_prefetch)
    with live:
        live.forward(Iteration(0, "prefill", (0,), (1,)), input_ids=PROMPT[:, :1])
        # Now layer 0 finds its experts in both slots, so the prefetch has to wait for one.
        live.forward(Iteration(1, "prefill", (0,), (1,)), input_ids=PROMPT[:, :1])
    hook.remove()
    assert arrived == [True, True]


def test_a_budget_for_everything_is_filled_before_serving(model: OffloadedModel) -> None:
    outcomes: list[LayerOutcome] = []
    with runtime(model, OnDemandPolicy(model.shape), slots=12) as live:
        live.listeners.append(outcomes.append)
        live.forward(PREFILL, input_ids=PROMPT)
    assert all(outcome.hits == outcome.activated for outcome in outcomes)


def test_a_finished_runtime_frees_its_slots_at_once(model: OffloadedModel) -> None:
    live = runtime(model, FineMoEPolicy(model.shape, FineMoEOptions(prefetch_distance=1)))
    freed = weakref.ref(live)
    gc.disable()
    try:
        with live:
            serve_and_drain(live)
        del live
        assert freed() is None
    finally:
        gc.enable()


def test_a_failing_searcher_fails_the_run_and_leaves_no_thread(model: OffloadedModel) -> None:
    def fail() -> Sequence[Prefetch]:
        raise RuntimeError("no such map")

    before = set(threading.enumerate())
    spy = Spy(model.shape, Placement("background"))
    spy.act = fail
    with (
        pytest.raises(BackgroundError, match="RuntimeError: no such map"),
        runtime(model, spy) as live,
    ):
        serve_and_drain(live)
    assert set(threading.enumerate()) == before


def test_a_failing_copy_fails_the_run_and_leaves_no_thread(
    model: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: EmulatedLink, chunk: Chunk) -> None:
        raise OSError("the bus is gone")

    before = set(threading.enumerate())
    monkeypatch.setattr(EmulatedLink, "start", fail)
    policy = OnDemandPolicy(model.shape)
    with pytest.raises(BackgroundError, match="the bus is gone"), runtime(model, policy) as live:
        live.forward(PREFILL, input_ids=PROMPT)
    assert set(threading.enumerate()) == before


def test_the_model_can_be_served_by_one_runtime_after_another(model: OffloadedModel) -> None:
    logits = []
    for slots in (2, 12):
        with runtime(model, OnDemandPolicy(model.shape), slots) as live:
            logits.append(live.forward(PREFILL, input_ids=PROMPT).logits)
    assert torch.equal(logits[0], logits[1])
