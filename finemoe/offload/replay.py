"""The replay runtime: one policy over a routing trace, in virtual time.

Policy, cache and transfer queues are the objects of the live runtime; here links, searcher and
compute are times on one clock. What the live runtime does in threads happens at events: a link has
copied, a search has ended, an expert has been computed.
"""

import heapq
from collections import deque
from collections.abc import Callable
from functools import cache, partial

from finemoe.offload.policy import Gates, Hook, LayerOutcome, Policy, Priorities, call_hook
from finemoe.offload.residency import Residency
from finemoe.offload.routed import RoutedIteration
from finemoe.offload.runtime import (
    SEARCH_QUEUE_ITERATIONS,
    CostModel,
    Extra,
    OutcomeListener,
    PhaseSeconds,
)
from finemoe.offload.timeline import Timeline
from finemoe.offload.virtual_links import LinkRate, VirtualLinks

Call = Callable[[], Priorities | None]


class ReplayRuntime:
    """Serves routed iterations under one policy; `now` is the virtual time in seconds."""

    def __init__(
        self,
        policy: Policy,
        residency: Residency,
        costs: CostModel,
        rate: LinkRate,
        timeline: Timeline | None = None,
    ) -> None:
        self.policy = policy
        self.residency = residency
        self.phases = PhaseSeconds()
        self.listeners: list[OutcomeListener] = []
        self.now = 0.0
        self._costs = costs
        self._timeline = timeline
        self._links = VirtualLinks(residency, rate, timeline)
        residency.wake = lambda: self._links.kick(self.now)
        self._thread_costs = costs.thread
        self._dense_disturbed = self._expert_disturbed = False
        """Whether the model's thread waited since it last ran each part of a layer."""
        self._events: list[tuple[float, int, int | Callable[[], None]]] = []
        """When, in which order, and what: an expert is computed, or a call is due."""
        self._tickets = 0
        self._arrived: deque[int] = deque()
        self._hosted: deque[tuple[int, int]] = deque()
        """What the host still computes in this layer, first what is under way, and its tokens."""
        self._searches: deque[float] = deque()
        self._devices_free = [0.0] * len(residency.plan.slots)
        self._expert_seconds: Callable[[int], float] = cache(costs.expert)
        self._observed = policy.placement.prediction != "none"

    def forward(self, routed: RoutedIteration) -> float:
        """Run one iteration; return the time at which its tokens are there."""
        iteration = routed.iteration
        costs = self._costs.iteration(iteration.tokens, routed.contexts)
        by_token = self.policy.placement.by_token
        predictions = self._costs.prediction.of(sum(iteration.tokens) if by_token else 1)
        began = self.now
        gates = None
        self.residency.begin_iteration(iteration)
        if self._observed:
            self._collect()
            hidden = routed.hidden_states if self.policy.placement.hidden_states else None
            gates = Gates(routed.probabilities, routed.activated, hidden)
            call = partial(self._on_embeddings, routed, gates)
            hook: Hook = self.policy.on_embeddings
            self._ask("search", predictions.embeddings, iteration.number, hook, -1, call)
            self._await_prefetches()
        self._advance(self.now + costs.start)
        for layer in range(self.residency.shape.layers):
            extra = self._extra(self._thread_costs.dense, self._dense_disturbed)
            self._dense_disturbed = False
            self._advance(self.now + costs.dense + extra)
            self._layer(routed, layer, gates, predictions.gate)
        self._advance(self.now + costs.finish)
        if self._observed:
            hook = self.policy.end_iteration
            call = partial(call_hook, hook, -1, iteration)
            self._ask("update", predictions.update, iteration.number + 1, hook, -1, call)
        self._span("iterations", iteration.phase, began, self.now)
        return self.now

    def wait_until(self, time: float) -> None:
        """Let time pass without computing, as when no request is there."""
        self._advance(max(time, self.now))

    def end_request(self, request: int) -> None:
        """Tell the policy that a request is served."""
        if self._observed:
            hook = self.policy.end_request
            self._ask("update", 0.0, 0, hook, -1, partial(call_hook, hook, -1, request))

    def drain(self) -> None:
        """Let time pass until the searcher has consumed all that was published."""
        while self._searches:
            self._advance(self._searches[-1])

    def _layer(
        self, routed: RoutedIteration, layer: int, gates: Gates | None, seconds: float
    ) -> None:
        self._arrived.clear()
        activated, counts = routed.activated[layer], routed.counts[layer].tolist()
        outcome = self.residency.gate(routed.iteration, layer, activated, counts)
        if outcome.host:
            first = layer * self.residency.shape.experts
            self._hosted.extend((first + index, counts[index]) for index in outcome.host)
            self._start_host()
        for listener in self.listeners:
            listener(outcome)
        if gates is not None:
            self._collect()
            hook = self.policy.on_gate
            call = partial(call_hook, hook, layer, routed.iteration, gates.of(layer))
            self._ask("search", seconds, routed.iteration.number, hook, layer, call)
        self._compute(outcome, counts)
        self._await_prefetches()

    def _on_embeddings(self, routed: RoutedIteration, gates: Gates) -> Priorities | None:
        answer: Priorities | None = call_hook(
            self.policy.on_embeddings, -1, routed.iteration, routed.embeddings
        )
        if self.policy.predict_ahead:
            call_hook(self.policy.predict_ahead, -1, routed.iteration, gates)
        return answer

    def _compute(self, outcome: LayerOutcome, counts: list[int]) -> None:
        """Run experts in order of arrival; the layer ends with the last of them, and the host's."""
        first = outcome.layer * self.residency.shape.experts
        ready = deque([first + index for index in outcome.hits])
        waiting = len(outcome.late) + len(outcome.misses)
        end = self.now
        while ready or waiting:
            if not ready:
                self.phases.on_demand_wait += self._await("on demand", lambda: self._arrived)
            while self._arrived:
                ready.append(self._arrived.popleft())
                waiting -= 1
            flat = ready.popleft()
            end = max(end, self._run_expert(flat, counts[flat - first]))
        while self._hosted:
            self._happen()
        self._advance(max(end, self.now))

    def _start_host(self) -> None:
        """Have the host compute its next expert, or leave its memory to the links."""
        if not self._hosted:
            self._links.host_reads(self.now, 0.0)
            return
        flat, tokens = self._hosted[0]
        seconds = self._costs.host(tokens)
        rate = self.residency.plan.expert_bytes / seconds
        end = self.now + seconds / self._links.host_reads(self.now, rate)
        self._span("host", f"expert {self.residency.experts[flat].index}", self.now, end)
        self._at(end, self._host_done)

    def _host_done(self) -> None:
        self._hosted.popleft()
        self._start_host()

    def _run_expert(self, flat: int, tokens: int) -> float:
        """Take a device's time for one expert and free it afterwards; return when that is."""
        device = self.residency.cache.device_of(flat)
        extra = self._extra(self._thread_costs.expert, self._expert_disturbed)
        self._expert_disturbed = False
        seconds = self._expert_seconds(tokens) + extra
        began = max(self._devices_free[device], self.now)
        end = self._devices_free[device] = began + seconds + (self._costs.hop if device else 0.0)
        if self._timeline:
            name = f"expert {self.residency.experts[flat].index}"
            self._timeline.span(f"device {device}", name, began, end)
        if self._costs.parallel:
            self._at(end, flat)
        else:
            self._advance(end)
            self.residency.release(flat)
        return end

    def _await_prefetches(self) -> None:
        if self.policy.placement.awaited:
            self.phases.prefetch_wait += self._await("prefetches", self.residency.arrived)

    def _await(self, what: str, there: Callable[[], object]) -> float:
        """Let the model's thread wait until something is there; return the seconds."""
        began = self.now
        if not there():
            while not there():
                if not self._events and not self._links.copying:
                    raise RuntimeError("the replay waits for an expert that no link will bring")
                self._happen()
            self._dense_disturbed = self._expert_disturbed = True
            self._advance(self.now + self._thread_costs.resume)
        self._span("waits", what, began, self.now)
        return self.now - began

    def _extra(self, extra: Extra, disturbed: bool) -> float:
        """Return the seconds that a part of a layer takes more now."""
        seconds = extra.after_wait if disturbed else 0.0
        return seconds + extra.while_copying if self._links.copying else seconds

    def _collect(self) -> None:
        self.phases.context_collection += self._costs.collect
        self._advance(self.now + self._costs.collect)

    def _ask(
        self, phase: str, seconds: float, number: int, hook: Hook, layer: int, call: Call
    ) -> None:
        """Have a hook called for an iteration, now or when the searcher gets to it."""
        setattr(self.phases, phase, getattr(self.phases, phase) + seconds)
        if self.policy.placement.prediction != "background":
            self._advance(self.now + seconds)
            self.residency.prefetch(number, call(), hook, layer)
            return
        capacity = SEARCH_QUEUE_ITERATIONS * (self.residency.shape.layers + 2)
        if len(self._searches) >= capacity:
            self._advance(self._searches[-capacity])
        began = max(self.now, self._searches[-1]) if self._searches else self.now
        self._searches.append(began + seconds)
        self._span("searcher", phase, began, began + seconds)
        self._at(began + seconds, partial(self._search_done, number, call, hook, layer))

    def _search_done(self, number: int, call: Call, hook: Hook, layer: int) -> None:
        self._searches.popleft()
        self.residency.prefetch(number, call(), hook, layer)

    def _at(self, time: float, action: int | Callable[[], None]) -> None:
        self._tickets += 1
        heapq.heappush(self._events, (time, self._tickets, action))

    def _advance(self, to: float) -> None:
        """Let everything happen that is due until `to`, in order of time."""
        events, links = self._events, self._links
        while links.next_event <= to or (events and events[0][0] <= to):
            self._happen()
        self.now = to

    def _span(self, track: str, name: str, start: float, end: float) -> None:
        if self._timeline:
            self._timeline.span(track, name, start, end)

    def _happen(self) -> None:
        if self._events and self._events[0][0] < self._links.next_event:
            self.now, _, action = heapq.heappop(self._events)
            if isinstance(action, int):
                self.residency.release(action)
            else:
                action()
            return
        self.now = self._links.next_event
        self._arrived.extend(self._links.progress(self.now))
