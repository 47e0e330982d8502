"""Live serving, fuzzed: lossless within the budget, and every fault ends soon in its own error."""

import faulthandler
import itertools
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.on_demand import OnDemandPolicy
from experiments.run.live import PlainRuntime
from experiments.run.models import FAMILIES, small_model
from finemoe.offload.device import EmulatedLink
from finemoe.offload.live import BackgroundError
from finemoe.offload.policy import Policy, PolicyError, Routing
from tests import engine
from tests.engine import OPTIONS, logits_of, offloaded, prepared, requests
from tests.fuzz import fuzzed

PATIENCE_S = 60.0


class Hang(BaseException):
    """A case took longer than it ever should."""


@contextmanager
def watched(interrupt_s: float | None = None) -> Iterator[None]:
    """Interrupt the block after some seconds, as Ctrl-C does, and fail it if it hangs."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupt_s
        if interrupt_s is not None:
            interrupt_s = None
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S, 1.0)
            raise KeyboardInterrupt
        faulthandler.dump_traceback(2)
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, interrupt_s or PATIENCE_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Case:
    """One run of one architecture under one system."""

    family: str
    system: str
    options: dict[str, Any]
    slots: tuple[int, ...]
    batch: int
    length: int
    link_gb_s: float
    chunk_bytes: int
    history: bool
    protect: bool
    switch_s: float


shared = cache(offloaded)


@cache
def plain(family: str) -> PlainRuntime:
    return PlainRuntime(small_model(family))


@cache
def expected(family: str, batch: int, length: int) -> tuple[list[torch.Tensor], Routing]:
    """Return the plain model's logits, and what its gates choose."""
    logits = logits_of(plain(family), requests(batch, length))
    return logits, engine.recorded(shared(family), requests(batch, length))[1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family = draw(st.sampled_from(list(FAMILIES)))
    system = draw(st.sampled_from(list(OPTIONS)))
    devices = draw(st.integers(1, 4))
    size = shared(family).shape.size
    homes = [len(range(device, size, devices)) for device in range(devices)]
    return Case(
        family,
        system,
        {name: draw(st.sampled_from(values)) for name, values in OPTIONS[system].items()},
        tuple(draw(st.integers(1, home)) for home in homes),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 6)),
        link_gb_s=draw(st.sampled_from([0.5, 5.0, 100.0])),
        chunk_bytes=draw(st.sampled_from([512, 2048, 10**6])),
        history=draw(st.booleans()),
        protect=draw(st.booleans()),
        switch_s=draw(st.sampled_from([1e-6, 1e-5, 5e-3])),
    )


def policy_of(case: Case) -> Policy:
    """Return the case's policy as its YAML describes it, prepared as a run prepares it."""
    model = shared(case.family)
    policy = engine.configured(case.system, model.shape, **case.options)
    prepared(policy, model, case.history)
    if policy.set_future_routing:
        policy.set_future_routing(expected(case.family, case.batch, case.length)[1])
    return policy


def serve(case: Case, policy: Policy) -> None:
    """Serve the case; its logits are the plain model's, its slots are never too many."""
    model = shared(case.family)
    links: Any = {"link_gb_s": case.link_gb_s, "chunk_bytes": case.chunk_bytes}
    logits, _ = expected(case.family, case.batch, case.length)
    runtime = engine.offloading(model, policy, case.slots, protect=case.protect, **links)
    with runtime:
        computed = logits_of(runtime, requests(case.batch, case.length))
        runtime.drain()
    assert all(map(torch.equal, computed, logits))
    assert len(computed) == len(logits)
    runtime.residency.cache.check_integrity()
    assert runtime.residency.cache.peak_occupied <= sum(case.slots)


@contextmanager
def undisturbed(case: Case) -> Iterator[None]:
    """Have nothing of a runtime left after the block: no thread, no hook, no experts' forward."""
    threads, interval = set(threading.enumerate()), sys.getswitchinterval()
    sys.setswitchinterval(case.switch_s)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
    left = set(threading.enumerate()) - threads
    for thread in left:
        # One whose start was interrupted may only begin, and end, now.
        if thread._started.wait(1):  # type: ignore[attr-defined]
            thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in left)
    model = shared(case.family)
    assert not any(module._forward_hooks for module in model.model.modules())
    assert not any("offload_forward" in vars(module) for module in model.experts)


@given(case=cases())
@fuzzed(30)
def test_whatever_is_served_is_lossless_within_its_budget(case: Case) -> None:
    policy = policy_of(case)
    with watched(), undisturbed(case):
        serve(case, policy)


ASKED = ("on_embeddings", "on_gate", "end_iteration")
TOLD = ("end_request", "on_outcome", "on_load", "on_evict")
ERRORS = (ValueError, KeyError, RuntimeError, StopIteration, MemoryError, AssertionError)


@dataclass
class Fault:
    """What goes wrong, at which call of which hook, or of a link."""

    where: str
    nth: int
    act: Callable[[], Any]
    fired: list[str] = field(default_factory=list)
    """The thread in which it went wrong."""
    calls: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def call(self, real: Callable[..., Any], *arguments: Any) -> Any:
        if next(self.calls) != self.nth:
            return real(*arguments)
        self.fired.append(threading.current_thread().name)
        return self.act()

    def infect(self, policy: Policy) -> None:
        """Have a policy's hook go wrong; its class keeps its name."""
        real, kind = getattr(policy, self.where), type(policy)

        def hook(_policy: Policy, *arguments: Any) -> Any:
            return self.call(real, *arguments)

        hook.__name__ = self.where
        policy.__class__ = type(kind.__name__, (kind,), {self.where: hook})


def fail(error: type[BaseException]) -> None:
    raise error("out of order")


def tables(layers: int, experts: int) -> st.SearchStrategy[Any]:
    """Return arrays that are neither keys nor priorities of (layers, experts)."""
    shapes = [(layers + 1, experts), (layers, experts + 1), (layers * experts,), (experts,), ()]
    good = np.ones((layers, experts))
    wrong = [np.ones(shape) for shape in shapes if shape != good.shape]
    wrong += [good.astype(kind) for kind in (np.float32, np.int64, bool, object, ">f8")]
    return st.sampled_from([*wrong, 3.0, "keys", (), good.tolist()])


@st.composite
def faults(draw: st.DrawFn, case: Case) -> Fault:
    """Draw a hook that raises or answers nonsense, or a copy that fails."""
    nth = draw(st.integers(1, 8))
    shape = shared(case.family).shape
    where = draw(st.sampled_from(["start", "finish", *ASKED, *TOLD, "eviction_keys"]))
    if where in ("start", "finish"):
        return Fault(where, nth, partial(fail, draw(st.sampled_from([OSError, SystemExit]))))
    if where in TOLD or draw(st.booleans()):
        return Fault(where, nth, partial(fail, draw(st.sampled_from(ERRORS))))
    wrong = tables(shape.layers, shape.experts)
    answer = draw(wrong | st.none() if where == "eviction_keys" else wrong)
    return Fault(where, nth, lambda: answer)


@given(data=st.data(), case=cases())
@fuzzed(10)
def test_a_fault_ends_in_its_own_error(data: st.DataObject, case: Case) -> None:
    policy, fault = policy_of(case), data.draw(faults(case))
    with pytest.MonkeyPatch.context() as patch:
        if fault.where in ("start", "finish"):
            real = getattr(EmulatedLink, fault.where)
            patch.setattr(EmulatedLink, fault.where, lambda *given: fault.call(real, *given))
            due: type[Exception] = BackgroundError
            says = "out of order"
        else:
            says = rf"^{type(policy).__name__}\.{fault.where}(, layer \d+)?: (raised|answered) "
            fault.infect(policy)
            due = PolicyError
        with watched(), undisturbed(case):
            try:
                serve(case, policy)
                error = None
            except due as raised:
                error = str(raised)
        if error is None:
            # What goes wrong beside the last tokens is nobody's loss.
            assert all(name.startswith("link") for name in fault.fired)
        else:
            assert fault.fired
            assert re.search(says, error), error
    again = OnDemandPolicy(shared(case.family).shape)
    with watched(), undisturbed(case):
        serve(case, again)


@given(case=cases(), interrupt_s=st.floats(1e-5, 0.06))
@fuzzed(5)
def test_an_interrupted_model_serves_again(case: Case, interrupt_s: float) -> None:
    policy = policy_of(case)
    expected(case.family, case.batch, case.length)
    with undisturbed(case), suppress(KeyboardInterrupt), watched(interrupt_s):
        serve(case, policy)
    with watched(), undisturbed(case):
        serve(case, OnDemandPolicy(shared(case.family).shape))
