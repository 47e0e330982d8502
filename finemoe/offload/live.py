"""The live runtime: one policy over one real model, with a thread per link and one for searches."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from finemoe.offload.device import DeviceClock, DeviceSlots, Dispatch, HostCopy, Link
from finemoe.offload.model import OffloadedModel, grouped_mm
from finemoe.offload.policy import (
    FloatArray,
    Gate,
    Gates,
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
    thread and those of all others; None leaves them to the operating system. `grouped` has
    transformers' grouped kernel compute, which must find all experts of `memory` in order: nothing
    waits for a gate then, but the sums differ in their last bits from those of expert by expert.
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
    grouped: bool = False

    def __post_init__(self) -> None:
        self._observed = self.policy.placement.prediction != "none"
        seen = self.timeline is not None and not self.grouped
        self._unhurried = self.residency.holds_everything and not seen
        """Whether gates are told of after the iteration, as nothing has to be loaded for them; a
        timeline shows each when it speaks, if the kernel lets it."""
        # Every field has one writer: the thread that predicts, or the model's. Replace it drained.
        self.phases = PhaseSeconds()
        # Guarded by the lock, residency with all that it calls of the policy included. The lock is
        # entered as such: an interrupt cannot come between taking it and the block that frees it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Tells the model's thread of arrivals, of links that fall asleep, and of failures."""
        self._roused = threading.Condition(self._lock)
        """Tells links that they are not among the sleepers any more."""
        self._asleep: set[int] = set()  # links that found nothing to copy, until `wake`
        self._in_flight = [deque[Chunk]() for _ in self.links]
        """By link, chunks whose copies were begun, in that order; its thread takes them out."""
        self._wake = self.residency.wake = partial(_rouse, self._asleep, self._roused)
        self._arrived: deque[int] = deque()
        self._error: BaseException | None = None
        self._stopping = False
        # The model thread's.
        self.listeners: list[OutcomeListener] = []
        self._entered = ExitStack()
        self._threads: list[threading.Thread] = []
        self._worker: Worker | None = None
        self._iteration: Iteration | None = None
        self._gates: list[tuple[Tensor, Tensor] | None] = [None] * self.model.shape.layers
        """Input and logits of each gate until its experts run, whose own input may be another."""
        self._unread: list[HostCopy] = []
        """What embedding and gates said in this iteration, if that is told when it is over."""
        self._untold: tuple[Iteration, list[HostCopy]] | None = None
        """The same of the last iteration, until `_settle` tells it."""
        self._computed: list[tuple[str, str, Callable[[], float], Callable[[], float]]] = []
        """Spans of kernels, written at a time when nobody has to wait for them."""
        self._clock_of = cache(DeviceClock)

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
        # After an iteration there is nothing to hurry for: two threads would only take turns.
        if self.policy.placement.prediction == "background" and not self._unhurried:
            capacity = SEARCH_QUEUE_ITERATIONS * (self.model.shape.layers + 2)
            self._worker = Worker(capacity, self._fail)
            self._threads.append(self._worker)
        for thread in self._threads:
            thread.start()

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time so far of the model's thread, which calls this, and of the others.

        They share one interpreter: what links and searcher take of it, the model waits for.
        """
        taken = {"model": time.thread_time(), "links": 0.0, "searcher": 0.0}
        # The clock of one that ended must not be asked for.
        for thread in filter(threading.Thread.is_alive, self._threads):
            clock = time.pthread_getcpuclockid(thread.ident or 0)
            kind = "searcher" if thread is self._worker else "links"
            taken[kind] += time.clock_gettime(clock)
        return taken

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
        self._settle()
        self._iteration, self._unread = iteration, []
        with self._lock:
            self._raise_failure()
            self.residency.begin_iteration(iteration)
        began = time.perf_counter()
        output = self.model.model(**inputs)
        self._note("iterations", iteration.phase, began, time.perf_counter())
        if self._unhurried:
            self._untold = iteration, self._unread
        else:
            hook = self.policy.end_iteration
            self._publish("update", iteration.number + 1, hook, lambda: (iteration,))
        return output

    def end_request(self, request: int) -> None:
        self._settle()
        self._publish("update", 0, self.policy.end_request, lambda: (request,))

    def drain(self) -> None:
        """Wait until the searcher has consumed all that was published."""
        self._settle()
        if self._worker is not None:
            self._worker.drain()
        with self._lock:
            self._raise_failure()

    # The model ------------------------------------------------------------------------------------

    def _attach(self) -> None:
        embedding = self.model.model.get_input_embeddings()
        enter = self._entered.enter_context
        enter(embedding.register_forward_hook(self._on_embeddings))
        run = self._run_resident_layer if self._unhurried else self._run_layer
        layers = zip(self.model.gates, self.model.experts, strict=True)
        for layer, (gate, experts) in enumerate(layers):
            enter(gate.register_forward_hook(partial(self._on_gate, layer)))
            extra: dict[str, Any] = {"offload_forward": partial(run, layer)}
            if self.grouped:
                count = self.model.shape.experts
                extra |= self.memory.stacked(layer * count, count)
            for name, value in extra.items():
                vars(experts)[name] = value
                self._entered.callback(vars(experts).pop, name, None)

    def _on_embeddings(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        iteration = self._iteration
        assert iteration is not None
        if not self._observed:
            return
        with self._timed("context_collection"):
            copy = HostCopy(output)
        if self._unhurried:
            self._unread.append(copy)
            return
        hook = self.policy.on_embeddings
        self._publish("search", iteration.number, hook, lambda: (iteration, *_arrays(copy)))
        self._await_prefetches()

    def _on_gate(self, layer: int, _module: Any, inputs: Any, output: Any) -> None:
        self._gates[layer] = inputs[0], output[self.model.logits_index]

    def _run_layer(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert self._iteration is not None
        # One wait for all that the host is to see of a layer.
        copy = HostCopy(*self._shown(layer, index))
        chosen = copy.read()[0].numpy()
        routing = Dispatch(hidden, index, chosen, weights, self.model.sums)
        with self._lock:
            self._raise_failure()
            self._arrived.clear()
            outcome = self.residency.gate(self._iteration, layer, routing.activated, routing.tokens)
            self._begin_demands()
        copied = HostCopy(hidden) if outcome.host else None
        for listener in self.listeners:
            listener(outcome)
        if self._observed:
            self._publish_gate(outcome, copy)
        output = self._compute(outcome, routing, copied)
        self._await_prefetches()
        return output

    def _run_resident_layer(
        self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Compute at once what cannot miss; `_settle` tells of it."""
        copy = HostCopy(*self._shown(layer, index))
        self._unread.append(copy)
        if self.grouped:
            return grouped_mm(self.model.experts[layer], hidden, index, weights)
        chosen = copy.read()[0].numpy()
        routing = Dispatch(hidden, index, chosen, weights, self.model.sums)
        flat = layer * self.model.shape.experts
        return routing.combine({i: self._run_expert(flat + i, routing) for i in routing.activated})

    def _shown(self, layer: int, index: Tensor) -> list[Tensor]:
        """Return what the host sees of a layer: choices, then what the policy is to be told."""
        gate, self._gates[layer] = self._gates[layer], None
        if not self._observed or gate is None:
            return [index]
        hidden, logits = gate
        return [index, logits, hidden] if self.policy.placement.hidden_states else [index, logits]

    def _publish_gate(self, outcome: LayerOutcome, copy: HostCopy) -> None:
        iteration, layer = outcome.iteration, outcome.layer

        def shown() -> tuple[Iteration, Gate]:
            _, logits, *hidden = _arrays(copy)
            states = hidden[0] if hidden else None
            return iteration, Gate(layer, softmax(logits), outcome.activated, states)

        self._publish("search", iteration.number, self.policy.on_gate, shown, layer)

    def _settle(self) -> None:
        """Tell everybody what the last iteration routed, if that was put off."""
        self._note_computed()
        if self._untold is None:
            return
        (iteration, copies), self._untold = self._untold, None
        activated = []
        for layer, copy in enumerate(copies[self._observed :]):
            activated.append(tuple(np.unique(copy.read()[0].numpy()).tolist()))
            with self._lock:
                outcome = self.residency.gate(iteration, layer, activated[-1])
                for index in outcome.hits:
                    self.residency.release(layer * self.model.shape.experts + index)
            for listener in self.listeners:
                listener(outcome)
        if self._observed:
            self._tell(iteration, copies, activated)

    def _tell(
        self, iteration: Iteration, copies: list[HostCopy], activated: list[tuple[int, ...]]
    ) -> None:
        """Call the policy's hooks for a whole iteration."""
        (embeddings,), *routed = map(_arrays, copies)
        _, logits, *hidden = (np.stack(part) for part in zip(*routed, strict=True))
        gates = Gates(softmax(logits), activated, hidden[0] if hidden else None)
        policy, number = self.policy, iteration.number
        self._ask("search", number, policy.on_embeddings, lambda: (iteration, embeddings))
        if policy.predict_ahead:
            self._ask("search", number, policy.predict_ahead, lambda: (iteration, gates))
        for layer in range(len(routed)):
            shown = partial(lambda layer: (iteration, gates.of(layer)), layer)
            self._ask("search", number, policy.on_gate, shown, layer)
        self._ask("update", number + 1, policy.end_iteration, lambda: (iteration,))

    def _compute(self, outcome: LayerOutcome, routing: Dispatch, copied: HostCopy | None) -> Tensor:
        """Run experts in order of arrival; their outputs are added in a fixed order (rule 1).

        The host computes its own, of the `copied` tokens, while there is nothing to give a device.
        """
        outputs: dict[int, Tensor] = {}
        ready, first = deque(outcome.hits), outcome.layer * self.model.shape.experts
        waiting, hosted = {*outcome.late, *outcome.misses}, deque(outcome.host)
        while ready or waiting or hosted:
            if not ready:
                if hosted:
                    index = hosted.popleft()
                    outputs[index] = self._run_on_host(first + index, routing, copied)
                    with self._lock:
                        arrivals = self._take_arrivals()
                else:
                    arrivals = self._await("on_demand_wait", self._take_arrivals)
                ready.extend(index for index in arrivals if index in waiting)
                waiting.difference_update(arrivals)
                continue
            index = ready.popleft()
            outputs[index] = self._run_expert(first + index, routing)
            with self._lock:
                self.residency.release(first + index)
                self._begin_demands()
        return routing.combine(outputs)

    def _run_expert(self, flat: int, routing: Dispatch) -> Tensor:
        """Return an expert's output for the tokens that go to it, on the device where it lies."""
        expert, slot = self.residency.experts[flat], self.residency.cache.slot(flat)
        device = self.devices[slot.device]
        link = self.links[slot.device] if self.links else None
        rows = routing.gather(expert.index, device)
        if link:
            link.admit(slot)
        began = self._mark(device)
        output = self.model.kernels[expert.layer](rows, self.memory.weights(slot))
        if link:
            link.guard(slot)
        if self.timeline:
            name = f"expert {expert.layer}.{expert.index}"
            self._computed.append((f"device {slot.device}", name, began, self._mark(device)))
            if device.type != "cuda":
                self._note_computed()
        return output

    def _run_on_host(self, flat: int, routing: Dispatch, copied: HostCopy | None) -> Tensor:
        """Return an expert's output, computed on the host where its weights lie."""
        assert copied is not None
        expert, store = self.residency.experts[flat], self.model.store
        rows = routing.gather_on_host(expert.index, copied.read()[0])
        began = time.perf_counter()
        output = self.model.kernels[expert.layer](rows, store.layout.views(store.blocks[flat]))
        self._note("host", f"expert {expert.layer}.{expert.index}", began, time.perf_counter())
        return output

    def _mark(self, device: torch.device) -> Callable[[], float]:
        """Return what tells when a device came to this point, and waits for a CUDA device."""
        if self.timeline is None or device.type != "cuda":
            now = time.perf_counter()
            return lambda: now
        clock = self._clock_of(device)
        return partial(clock.seconds, clock.mark())

    def _note_computed(self) -> None:
        computed, self._computed = self._computed, []
        for track, name, began, ended in computed:
            self._note(track, name, began(), ended())

    # Policy, queue and threads --------------------------------------------------------------------

    def _publish(
        self, phase: str, number: int, hook: Hook, shown: Callable[[], Any], layer: int = -1
    ) -> None:
        """Have a hook called, here or by the worker, and its prefetches for an iteration queued."""
        if not self._observed:
            return
        if self._worker is None:
            self._ask(phase, number, hook, shown, layer)
            return
        with self._timed("context_collection"):
            self._worker.publish(partial(self._ask, phase, number, hook, shown, layer))

    def _ask(
        self, phase: str, number: int, hook: Hook, shown: Callable[[], Any], layer: int = -1
    ) -> None:
        # What the worker's thread waits for is nobody's loss.
        with nullcontext() if self._worker else self._timed("context_collection"):
            arguments = shown()
        with self._timed(phase):
            priorities = call_hook(hook, layer, *arguments)
        if priorities is None:
            return
        with self._timed("prefetch_issue"), self._lock:
            self.residency.prefetch(number, priorities, hook, layer)

    def _begin_demands(self) -> None:
        """Begin on-demand loads where that only queues copies: no other thread has to wake first.

        The caller holds the lock.
        """
        for device, link in enumerate(self.links):
            if not link.queued or self._error is not None:
                continue
            while chunk := self.residency.next_chunk(device, demanded=True):
                self._begin(device, link, chunk)
                self._wake()

    def _begin(self, device: int, link: Link, chunk: Chunk) -> None:
        link.start(chunk)
        self._in_flight[device].append(chunk)
        if chunk.stop == self.residency.plan.expert_bytes:
            self._announce(chunk.flat)

    def _drive(self, device: int, link: Link) -> None:
        """Copy what the queue of a link says, until the runtime stops or a copy fails."""
        in_flight = self._in_flight[device]
        try:
            while self._fill(device, link):
                times, oldest = link.finish(), in_flight[0]
                if self.timeline and times:
                    name = oldest.name(self.residency.experts[oldest.flat])
                    self.timeline.span(f"link {device}", name, *times)
                with self._lock:
                    in_flight.popleft()
                    if self.residency.chunk_done(device, oldest):
                        self._announce(oldest.flat)
        except BaseException as error:
            self._fail(error)
        finally:
            # Slots must not be freed under a copy.
            with suppress(Exception):
                for _ in in_flight:
                    link.finish()

    def _fill(self, device: int, link: Link) -> bool:
        """Begin as many copies as the link takes at once, and wait for something to copy if there
        is nothing in flight; tell whether there is."""
        in_flight, copied = self._in_flight[device], None
        with self._lock:
            while len(in_flight) < link.depth and not self._stopping and self._error is None:
                chunk = self.residency.next_chunk(device)
                if chunk is not None and link.queued:
                    self._begin(device, link, chunk)
                elif chunk is not None:
                    in_flight.append(chunk)
                    copied = chunk
                elif in_flight:
                    break
                else:
                    self._sleep(device, link)
        if copied is not None:
            link.start(copied)
        return bool(in_flight)

    def _sleep(self, device: int, link: Link) -> None:
        link.idle()
        self._asleep.add(device)
        self._changed.notify_all()
        while device in self._asleep:
            self._roused.wait()

    def _announce(self, flat: int) -> None:
        """Tell the model of an expert that it may compute with; it may have been told before."""
        with self._lock:
            if self.residency.cache.is_pinned(flat):
                self._arrived.append(flat)
            self._changed.notify_all()

    def _take_arrivals(self) -> list[int]:
        """Return which on-demand loads of the layer arrived since the last call, in that order."""
        arrivals = list(dict.fromkeys(flat % self.model.shape.experts for flat in self._arrived))
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

    def _note(self, track: str, name: str, began: float, ended: float) -> None:
        if self.timeline:
            self.timeline.span(track, name, began, ended)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            now = time.perf_counter()
            setattr(self.phases, phase, getattr(self.phases, phase) + now - start)
            self._note(phase, phase, start, now)


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


def _arrays(copy: HostCopy) -> list[FloatArray]:
    """Return rows of the last axis, float32."""
    return [one.float().reshape(-1, one.shape[-1]).numpy() for one in copy.read()]
