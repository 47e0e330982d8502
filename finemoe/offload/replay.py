"""The replay runtime: one policy over a routing trace, in virtual time.

Policy, cache and transfer queues are the objects of the live runtime; here links, searcher and
compute are times on one clock. What the live runtime does in threads happens at events: a link has
copied, a search has ended, an expert has been computed.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from finemoe.offload.policy import Gates, Hook, LayerOutcome, Policy, Priorities, call_hook
from finemoe.offload.residency import Residency
from finemoe.offload.routed import RoutedIteration
from finemoe.offload.runtime import SEARCH_QUEUE_ITERATIONS, OutcomeListener, PhaseSeconds
from finemoe.offload.timeline import Timeline
from finemoe.offload.virtual_links import LinkRate, VirtualLinks


@dataclass(frozen=True)
class IterationCosts:
    """Seconds of one forward pass, apart from experts."""

    start: float
    """From its beginning to the attention of the first MoE layer."""
    dense: float
    """From the end of one MoE layer to the decision of the next gate."""
    finish: float
    """From the end of the last MoE layer to the tokens on the host."""


@dataclass(frozen=True)
class PredictionCosts:
    """Seconds that calls of a policy take on the host."""

    embeddings: float = 0.0
    gate: float = 0.0
    update: float = 0.0
    # On top, for every token of the iteration but one.
    embeddings_token: float = 0.0
    gate_token: float = 0.0
    update_token: float = 0.0

    def of(self, tokens: int) -> "PredictionCosts":
        """Return what the calls take in an iteration of so many tokens."""
        more = tokens - 1
        if not more:
            return self
        return PredictionCosts(
            self.embeddings + more * self.embeddings_token,
            self.gate + more * self.gate_token,
            self.update + more * self.update_token,
        )


@dataclass(frozen=True)
class Extra:
    """Seconds that a part of a layer takes more than in a thread that is never disturbed."""

    after_wait: float = 0.0
    """If the thread waited since the part last ran: caches and core are not as it left them."""
    while_copying: float = 0.0
    """If a link copies: its thread takes turns with this one."""


@dataclass(frozen=True)
class ThreadCosts:
    """What waits and copies cost the model's thread; all zero where nobody measured it."""

    resume: float = 0.0
    """Seconds from the arrival that ends a wait until the thread goes on."""
    dense: Extra = Extra()
    expert: Extra = Extra()


class CostModel(Protocol):
    """Where virtual time comes from."""

    @property
    def parallel(self) -> bool:
        """Whether devices compute their experts at the same time."""

    @property
    def collect(self) -> float:
        """Seconds on the critical path to hand one context (embeddings or gate) to the policy."""

    @property
    def hop(self) -> float:
        """Seconds to send a layer's tokens to another device and back."""

    @property
    def prediction(self) -> PredictionCosts:
        """What calls of the policy cost."""

    @property
    def prediction_source(self) -> str:
        """Of which system and model that was measured, in words."""

    @property
    def thread(self) -> ThreadCosts:
        """What waits and copies cost the thread that runs the model."""

    def iteration(self, tokens: Sequence[int], contexts: Sequence[int]) -> IterationCosts:
        """Return the costs for a batch: each request's tokens now, and those it attends to."""

    def expert(self, tokens: int) -> float:
        """Return the seconds of one expert's computation for `tokens` tokens."""


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
        residency.wake = self._kick
        self._thread_costs = costs.thread
        self._dense_disturbed = self._expert_disturbed = False
        """Whether the model's thread waited since it last ran each part of a layer."""
        self._events: list[tuple[float, int, int | Callable[[], None]]] = []
        """When, in which order, and what: an expert is computed, or a call is due."""
        self._tickets = 0
        self._arrived: deque[int] = deque()
        self._searches: deque[float] = deque()
        self._devices_free = [0.0] * len(residency.plan.slots)
        self._known_seconds: dict[int, float] = {}
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

    # One MoE layer ----------------------------------------------------------------------------

    def _layer(
        self, routed: RoutedIteration, layer: int, gates: Gates | None, seconds: float
    ) -> None:
        self._arrived.clear()
        activated = routed.activated[layer]
        outcome = self.residency.gate(routed.iteration, layer, activated)
        for listener in self.listeners:
            listener(outcome)
        if gates is not None:
            self._collect()
            hook = self.policy.on_gate
            call = partial(call_hook, hook, layer, routed.iteration, gates.of(layer))
            self._ask("search", seconds, routed.iteration.number, hook, layer, call)
        self._compute(outcome, routed.counts[layer].tolist())
        self._await_prefetches()

    def _on_embeddings(self, routed: RoutedIteration, gates: Gates) -> Priorities | None:
        answer: Priorities | None = call_hook(
            self.policy.on_embeddings, -1, routed.iteration, routed.embeddings
        )
        if self.policy.predict_ahead:
            call_hook(self.policy.predict_ahead, -1, routed.iteration, gates)
        return answer

    def _compute(self, outcome: LayerOutcome, counts: list[int]) -> None:
        """Run experts in order of arrival; the layer ends with the last of them."""
        first = outcome.layer * self.residency.shape.experts
        ready = deque([first + index for index in outcome.hits])
        waiting = len(outcome.late) + len(outcome.misses)
        end = self.now
        while ready or waiting:
            if not ready:
                self._await_arrival()
            while self._arrived:
                ready.append(self._arrived.popleft())
                waiting -= 1
            flat = ready.popleft()
            end = max(end, self._run_expert(flat, counts[flat - first]))
        self._advance(end)

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

    def _expert_seconds(self, tokens: int) -> float:
        seconds = self._known_seconds.get(tokens)
        if seconds is None:
            seconds = self._known_seconds[tokens] = self._costs.expert(tokens)
        return seconds

    def _await_arrival(self) -> None:
        began = self.now
        if not self._arrived:
            while not self._arrived:
                self._step()
            self._resume()
        self.phases.on_demand_wait += self.now - began
        self._span("waits", "on demand", began, self.now)

    def _await_prefetches(self) -> None:
        if not self.policy.placement.awaited:
            return
        began = self.now
        if not self.residency.arrived():
            while not self.residency.arrived():
                self._step()
            self._resume()
        self.phases.prefetch_wait += self.now - began
        self._span("waits", "prefetches", began, self.now)

    def _resume(self) -> None:
        """Have the model's thread go on after a wait."""
        self._dense_disturbed = self._expert_disturbed = True
        self._advance(self.now + self._thread_costs.resume)

    def _extra(self, extra: Extra, disturbed: bool) -> float:
        """Return the seconds that a part of a layer takes more now."""
        seconds = extra.after_wait if disturbed else 0.0
        return seconds + extra.while_copying if self._links.copying else seconds

    # Policy -----------------------------------------------------------------------------------

    def _collect(self) -> None:
        self.phases.context_collection += self._costs.collect
        self._advance(self.now + self._costs.collect)

    def _ask(
        self,
        phase: str,
        seconds: float,
        number: int,
        hook: Hook,
        layer: int,
        call: Callable[[], Priorities | None],
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

    def _search_done(
        self, number: int, call: Callable[[], Priorities | None], hook: Hook, layer: int
    ) -> None:
        self._searches.popleft()
        self.residency.prefetch(number, call(), hook, layer)

    def _kick(self) -> None:
        self._links.kick(self.now)

    # The clock --------------------------------------------------------------------------------

    def _at(self, time: float, action: int | Callable[[], None]) -> None:
        self._tickets += 1
        heapq.heappush(self._events, (time, self._tickets, action))

    def _advance(self, to: float) -> None:
        """Let everything happen that is due until `to`, in order of time."""
        events, links = self._events, self._links
        while links.next_event <= to or (events and events[0][0] <= to):
            self._happen()
        self.now = to

    def _step(self) -> None:
        """Let the next thing happen; RuntimeError if nothing is left that could."""
        if not self._events and not self._links.copying:
            raise RuntimeError("the replay waits for an expert that no link is going to bring")
        self._happen()

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
