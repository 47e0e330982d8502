"""The live runtime: one policy over one real model, with a thread per link and one for searches."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

import torch
from torch import Tensor

from finemoe.offload.device import DeviceSlots, Dispatch, Link
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import (
    FloatArray,
    Gate,
    Hook,
    Iteration,
    LayerOutcome,
    Policy,
    PolicyError,
    call_hook,
)
from finemoe.offload.residency import Residency
from finemoe.offload.routed import softmax
from finemoe.offload.runtime import SEARCH_QUEUE_ITERATIONS, OutcomeListener, PhaseSeconds
from finemoe.offload.timeline import Timeline
from finemoe.offload.transfer import Chunk

Task = Callable[[], object]


class BackgroundError(RuntimeError):
    """A copy failed; the cause is chained."""


@dataclass(eq=False, repr=False)
class LiveRuntime:
    """Serves forward passes of an offloaded model under one policy.

    Use as a context manager: threads run between enter and exit, which leave nothing behind, also
    when they are interrupted. `forward` is to be called from one thread, the model's. Without
    `links` every expert must already be resident in `memory`. `cores` are those of the model's
    thread and those of all others; None leaves them to the operating system.
    """

    # Never written again; each link's `guard` is the model thread's, the rest its own thread's.
    model: OffloadedModel
    policy: Policy
    residency: Residency
    memory: DeviceSlots
    links: Sequence[Link]
    devices: Sequence[torch.device]
    timeline: Timeline | None = None
    cores: tuple[frozenset[int], frozenset[int]] | None = None

    def __post_init__(self) -> None:
        self._observed = self.policy.placement.prediction != "none"
        # Every field has one writer: the thread that predicts, or the model's. Replace it drained.
        self.phases = PhaseSeconds()
        # Guarded by the lock, residency with all that it calls of the policy included. The lock is
        # entered as such: an interrupt cannot come between taking it and the block that frees it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Tells the model's thread of arrivals, of links that fall asleep, and of failures."""
        self._roused = threading.Condition(self._lock)
        """Tells links that they are not among the sleepers any more."""
        self._asleep: set[int] = set()
        """Links that found nothing to copy; only `wake` takes them out."""
        self._wake = self.residency.wake = partial(_rouse, self._asleep, self._roused)
        self._arrived: deque[int] = deque()
        self._error: BaseException | None = None
        self._stopping = False
        # The model thread's.
        self.listeners: list[OutcomeListener] = []
        self._entered = ExitStack()
        self._threads: list[threading.Thread] = []
        self._worker: Worker | None = None
        self._unpublished: list[Task] = []
        self._iteration: Iteration | None = None
        self._logits: list[Tensor | None] = [None] * self.model.shape.layers

    def __enter__(self) -> Self:
        try:
            self._attach()
            # Threads inherit the cores of the one that starts them.
            with _on(self.cores[1]) if self.cores else nullcontext():
                self._start_threads()
            if self.cores:
                self._entered.enter_context(_on(self.cores[0]))
            return self
        except BaseException:
            self.__exit__()
            raise

    def _start_threads(self) -> None:
        for device, link in enumerate(self.links):
            drive = partial(self._drive, device, link)
            self._threads.append(threading.Thread(target=drive, name=f"link-{device}", daemon=True))
        if self.policy.placement.prediction == "background":
            capacity = SEARCH_QUEUE_ITERATIONS * (self.model.shape.layers + 2)
            self._worker = Worker(capacity, self._fail)
            self._threads.append(self._worker)
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        except KeyboardInterrupt:
            self._close()
            raise

    def _close(self) -> None:
        """Undo what entering did, or what is left of it."""
        self._entered.close()
        with self._lock:
            self._stopping = True
            self._wake()
        for thread in self._threads:
            if isinstance(thread, Worker):
                thread.close()
            elif thread.is_alive():
                thread.join()
        # They refer back to this runtime, whose slots must be freed with the last user.
        self._threads, self._worker = [], None

    def forward(self, iteration: Iteration, **inputs: Any) -> Any:
        """Run one forward pass; BackgroundError if a copy failed, PolicyError if the policy did."""
        self._iteration = iteration
        with self._lock:
            self._raise_failure()
            self.residency.begin_iteration(iteration)
        began = time.perf_counter()
        output = self.model.model(**inputs)
        self._span("iterations", iteration.phase, began)
        hook = self.policy.end_iteration
        self._publish("update", iteration.number + 1, hook, lambda: (iteration,))
        return output

    def end_request(self, request: int) -> None:
        """Tell the policy that a request is served."""
        self._publish("update", 0, self.policy.end_request, lambda: (request,))

    def drain(self) -> None:
        """Wait until the searcher has consumed all that was published."""
        if self._worker is not None:
            self._worker.drain()
        with self._lock:
            self._raise_failure()

    # The model ------------------------------------------------------------------------------------

    def _attach(self) -> None:
        embedding = self.model.model.get_input_embeddings()
        enter = self._entered.enter_context
        enter(embedding.register_forward_hook(self._on_embeddings))
        layers = zip(self.model.gates, self.model.experts, strict=True)
        for layer, (gate, experts) in enumerate(layers):
            enter(gate.register_forward_hook(partial(self._on_logits, layer)))
            self._entered.callback(vars(experts).pop, "offload_forward", None)
            experts.offload_forward = partial(self._run_layer, layer)  # type: ignore[assignment]

    def _on_embeddings(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        iteration = self._iteration
        assert iteration is not None
        if not self._observed:
            return
        with self._timed("context_collection"):
            embeddings = _to_numpy(output)
        hook = self.policy.on_embeddings
        self._publish("search", iteration.number, hook, lambda: (iteration, embeddings))
        self._await_prefetches()

    def _on_logits(self, layer: int, _module: Any, _inputs: Any, output: Any) -> None:
        self._logits[layer] = output[self.model.logits_index]

    def _run_layer(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert self._iteration is not None
        routing = Dispatch(hidden, index.cpu().numpy(), weights)
        with self._lock:
            self._raise_failure()
            self._arrived.clear()
            outcome = self.residency.gate(self._iteration, layer, routing.activated)
        for listener in self.listeners:
            listener(outcome)
        if self._observed:
            self._publish_gate(outcome, hidden)
        output = self._compute(outcome, routing)
        self._await_prefetches()
        return output

    def _publish_gate(self, outcome: LayerOutcome, hidden: Tensor) -> None:
        iteration, layer, logits = outcome.iteration, outcome.layer, self._logits[outcome.layer]
        assert logits is not None
        with self._timed("context_collection"):
            rows = _to_numpy(logits)
            states = _to_numpy(hidden) if self.policy.placement.hidden_states else None

        def shown() -> tuple[Iteration, Gate]:
            return iteration, Gate(layer, softmax(rows), outcome.activated, states)

        self._publish("search", iteration.number, self.policy.on_gate, shown, layer)

    def _compute(self, outcome: LayerOutcome, routing: Dispatch) -> Tensor:
        """Run experts in order of arrival; their outputs are added in a fixed order (rule 1)."""
        outputs: dict[int, Tensor] = {}
        ready = deque(outcome.hits)
        waiting = len(outcome.late) + len(outcome.misses)
        while ready or waiting:
            if not ready:
                arrivals = self._await("on_demand_wait", self._take_arrivals)
                waiting -= len(arrivals)
                ready.extend(arrivals)
            index = ready.popleft()
            flat = outcome.layer * self.model.shape.experts + index
            outputs[index] = self._run_expert(flat, routing)
            with self._lock:
                self.residency.release(flat)
        return routing.combine(outputs)

    def _run_expert(self, flat: int, routing: Dispatch) -> Tensor:
        """Return an expert's weighted output for the tokens that go to it, on the main device."""
        began = time.perf_counter()
        expert, slot = self.residency.experts[flat], self.residency.cache.slot(flat)
        rows = routing.gather(expert.index)
        kernel = self.model.kernels[expert.layer]
        weights = self.memory.weights(slot)
        output = kernel(rows.to(self.devices[slot.device]), weights).to(rows.device)
        if self.links:
            self.links[slot.device].guard(slot)
        weighed = routing.weigh(expert.index, output)
        self._span(f"device {slot.device}", f"expert {expert.layer}.{expert.index}", began)
        return weighed

    # Policy, queue and threads --------------------------------------------------------------------

    def _publish(
        self, phase: str, number: int, hook: Hook, shown: Callable[[], Any], layer: int = -1
    ) -> None:
        """Have a hook called, here or by the worker, and its prefetches for an iteration queued."""
        if not self._observed:
            return
        task = partial(self._ask, phase, number, hook, shown, layer)
        if self._worker is None:
            task()
            return
        self._unpublished.append(task)
        # With every expert resident nothing can be prefetched: one hand-over an iteration will do.
        if phase == "update" or not self.residency.holds_everything:
            tasks, self._unpublished = self._unpublished, []
            with self._timed("context_collection"):
                self._worker.publish(lambda: [task() for task in tasks])

    def _ask(
        self, phase: str, number: int, hook: Hook, shown: Callable[[], Any], layer: int
    ) -> None:
        with self._timed(phase):
            priorities = call_hook(hook, layer, *shown())
        if priorities is None:
            return
        with self._timed("prefetch_issue"), self._lock:
            self.residency.prefetch(number, priorities, hook, layer)

    def _drive(self, device: int, link: Link) -> None:
        """Copy what the queue of a link says, until the runtime stops or a copy fails."""
        in_flight: deque[tuple[Chunk, float]] = deque()
        try:
            while True:
                chunk = self._take_chunk(device, link, block=not in_flight)
                if chunk is not None:
                    began = time.perf_counter()
                    link.start(chunk)
                    in_flight.append((chunk, began))
                if in_flight and (chunk is None or len(in_flight) == link.depth):
                    oldest, began = in_flight.popleft()
                    link.finish()
                    name = oldest.name(self.residency.experts[oldest.flat])
                    self._span(f"link {device}", name, began)
                    self._arrive(device, oldest)
                elif not in_flight and chunk is None:
                    return
        except BaseException as error:
            self._fail(error)
        finally:
            # Slots must not be freed under a copy.
            with suppress(Exception):
                for _ in in_flight:
                    link.finish()

    def _take_chunk(self, device: int, link: Link, block: bool) -> Chunk | None:
        with self._lock:
            while not self._stopping and self._error is None:
                chunk = self.residency.next_chunk(device)
                if chunk is not None or not block:
                    return chunk
                link.idle()
                self._asleep.add(device)
                self._changed.notify_all()
                while device in self._asleep:
                    self._roused.wait()
        return None

    def _arrive(self, device: int, chunk: Chunk) -> None:
        with self._lock:
            if not self.residency.chunk_done(device, chunk):
                return
            if self.residency.cache.is_pinned(chunk.flat):
                self._arrived.append(chunk.flat)
            self._changed.notify_all()

    def _take_arrivals(self) -> list[int]:
        """Return which on-demand loads of the layer arrived since the last call."""
        arrivals = [flat % self.model.shape.experts for flat in self._arrived]
        self._arrived.clear()
        return arrivals

    def _await_prefetches(self) -> None:
        if self.policy.placement.awaited:
            self._await("prefetch_wait", self.residency.arrived)

    def _await(self, phase: str, condition: Callable[[], Any]) -> Any:
        """Wait until a condition holds and return it; RuntimeError if no link can bring that."""
        with self._timed(phase), self._lock:
            while not (met := condition()):
                self._raise_failure()
                if len(self._asleep) == len(self.links):
                    raise RuntimeError("the model waits for an expert that no link can bring")
                self._changed.wait()
            return met

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._wake()
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        error = self._error
        if isinstance(error, PolicyError):
            raise error
        if error is not None:
            what = f"a background thread failed: {type(error).__name__}: {error}"
            raise BackgroundError(what) from error

    def _span(self, track: str, name: str, began: float) -> None:
        if self.timeline:
            self.timeline.span(track, name, began, time.perf_counter())

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            setattr(self.phases, phase, getattr(self.phases, phase) + spent)
            self._span(phase, phase, start)


class Worker(threading.Thread):
    """The background searcher (section 4.3 of the paper): runs tasks in order from a bounded queue.

    A full queue makes the publisher wait. The first error stops the work: `on_error` is told, and
    later tasks are dropped, so a publisher never waits for a dead worker.
    """

    def __init__(self, capacity: int, on_error: Callable[[BaseException], None]) -> None:
        super().__init__(name="searcher", daemon=True)
        self._tasks: SimpleQueue[Task | threading.Event | None] = SimpleQueue()
        self._room = threading.Semaphore(capacity)
        self._on_error = on_error

    def publish(self, task: Task) -> None:
        self._room.acquire()
        self._tasks.put(task)

    def drain(self) -> None:
        """Wait until every published task is done or dropped."""
        reached = threading.Event()
        self._tasks.put(reached)
        reached.wait()

    def close(self) -> None:
        """Run what is left and end the thread, if it was started."""
        self._tasks.put(None)
        if self.is_alive():
            self.join()

    def run(self) -> None:
        failed = False
        while (task := self._tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                continue
            self._room.release()
            try:
                if not failed:
                    task()
            except BaseException as error:
                failed = True
                self._on_error(error)


def _rouse(asleep: set[int], roused: threading.Condition) -> None:
    # Not of the runtime, to which its residency would refer back else.
    asleep.clear()
    roused.notify_all()


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _to_numpy(tensor: Tensor) -> FloatArray:
    """Return rows of the last axis on the host."""
    # A copy even on the CPU: the worker reads it while the model goes on.
    return tensor.detach().float().reshape(-1, tensor.shape[-1]).cpu().numpy().copy()
