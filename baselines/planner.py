"""Planner: one expected value of every expert decides what is fetched and what leaves.

Three parts. `GatePredictor` turns the input of a gate into probabilities that later layers activate
their experts; `UseValue` turns those, and how often a request used each expert, into the expected
uses of a resident; `PlannerPolicy` prefetches what is likely, and only over residents of less
value. docs/planner.md holds the mathematics and what each part is worth.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, validate_call

from baselines.gate_predictor import SAMPLE, GatePredictor, logarithms
from baselines.hybrimoe import divided
from baselines.map_memory import MapMemory, chosen
from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    Iteration,
    Machine,
    ModelShape,
    Need,
    Placement,
    Policy,
    Priorities,
    Table,
)
from finemoe.options import CHECKED, Count, Number, Share, Whole

Ridge = Annotated[Number, Field(ge=1e-3)]
USUAL = 0.25  # how much a request's average counts where neighbours tell of the next visit


class UseValue:
    """How often requests use each expert, and what a resident is worth by that and by predictions.

    The value of an expert is its discounted expected uses: the probability of the next visit of its
    layer being one, and from then on, once every L layers, the average of the running requests.
    """

    def __init__(self, shape: ModelShape, discount: float, recency: float) -> None:
        self.shape = shape
        self._recency = recency
        self._counts = np.zeros((shape.layers, shape.experts))
        self._tokens = 0
        layers = np.arange(shape.layers)
        # By the next layer to be run: layers until each layer's next visit, from 1 on.
        away = (layers - np.arange(shape.layers + 1)[:, None]) % shape.layers + 1.0
        self.away = away[:, :, None]
        self._near = discount**self.away
        later = min(discount, 1 - 1e-9) ** shape.layers
        self._far = self._near * later / (1 - later)
        self.forget()

    def learn(self, probabilities: FloatArray) -> None:
        """Count what gates choose, (L, T, J)."""
        self._counts += chosen(probabilities, self.shape.top_k).sum(axis=1)
        self._tokens += probabilities.shape[1]

    def forget(self) -> None:
        """Forget all requests; the history is over."""
        self._running: dict[int, Table] = {}
        share = self.shape.top_k / self.shape.experts
        self._usual = (self._counts + share) / (self._tokens + 1)
        self.begin(())

    def begin(self, requests: tuple[int, ...]) -> None:
        """Go by the averages of these requests; new ones start with the history's frequencies."""
        for request in requests:
            self._running.setdefault(request, self._usual.copy())
        averages = [self._running[request] for request in requests]
        self.rates = union(averages or [self._usual]).copy()

    def end(self, request: int) -> None:
        self._running.pop(request, None)

    def observe(self, iteration: Iteration, first: int, probabilities: FloatArray) -> Table:
        """Have the averages of S layers from `first` on follow what gates chose, (S, T, J).

        Returns the rates that hold once these gates have spoken, (S, J).
        """
        uses = chosen(probabilities, self.shape.top_k)
        averages = []
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            average = self._running[request][first : first + len(uses)]
            weight = 1 - (1 - self._recency) ** (rows.stop - rows.start)
            average += weight * (uses[:, rows].mean(axis=1) - average)
            averages.append(average)
        return union(averages)

    def of(self, following: int, likely: Table) -> Table:
        """Return the value of every expert before layer `following` runs.

        `likely` (L, J) are the probabilities of the next visit.
        """
        return self._near[following] * likely + self._far[following] * self.rates


class PlannerPolicy(Policy):
    """Prefetches by probability over the root of the distance; the least valuable resident goes."""

    placement = Placement(
        "background", hidden_states=True, replaces=True, displaces_less=True, wraps=True
    )

    @validate_call(config=CHECKED)
    def __init__(
        self,
        shape: ModelShape,
        horizon: Count = 10,  # layers that a gate's input tells of
        threshold: Share = 0.1,  # probability of activation from which on an expert is prefetched
        discount: Share = 0.95,  # what a use one layer later is worth
        recency: Share = 0.05,  # weight of one token in the average of a request's activations
        memory: Whole = 4096,  # tokens whose maps are kept
        ridge: Ridge = 1.0,  # strength with which the regression is held to the gates' own logits
    ) -> None:
        self.shape = shape
        self.predictor = GatePredictor(shape, horizon, ridge)
        self.value = UseValue(shape, discount, recency)
        self.memory = MapMemory(shape, memory)
        self.reach = self.predictor.horizon  # layers ahead of which the next token's are asked for
        self._threshold = threshold
        self.set_gates = self.predictor.set_gates
        self._inputs: dict[int, list[FloatArray]] = {}
        self._trails: dict[int, list[FloatArray]] = {}
        self._nearness = 1 / np.sqrt(self.value.away)
        self.begin_serving()

    def set_machine(self, machine: Machine) -> None:
        """Admit no more copies than the host's memory feeds at the links' full rate.

        While links share it a copy in vain holds up the others' as if they stood in one queue. If
        what could be copied is as often sure as unlikely, the likeliest `share` of it begins at the
        probability 1 - share.
        """
        self._machine = machine
        self._threshold = max(self._threshold, 1 - machine.share)

    def begin_serving(self) -> None:
        self.predictor.fit()
        self.value.forget()
        self._said: dict[int, FloatArray] = {}
        self._cosines: dict[int, FloatArray] = {}
        self._logs: FloatArray = np.empty((0, 0, 0), np.float32)
        self._ahead: tuple[Table, FloatArray, FloatArray] | None = None
        self._absent = np.ones((self.shape.layers, self.shape.experts), dtype=bool)
        self._likely = self.value.rates.copy()  # probabilities of the next visit, as far as known
        self._keys = -self.value.of(0, self._likely)

    def learn(self, iteration: Iteration, embeddings: FloatArray, gates: Gates) -> None:
        assert gates.hidden_states is not None
        inputs = np.concatenate([embeddings[None], gates.hidden_states])
        logs = logarithms(gates.probabilities)
        self.value.learn(gates.probabilities)
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            self._inputs.setdefault(request, []).append(inputs[:, rows])
            self._trails.setdefault(request, []).append(logs[:, rows])

    def end_request(self, request: int) -> None:
        """Learn from a request of the history by those before it; remember whatever was served."""
        self.value.end(request)
        self._said.pop(request, None)
        self._cosines.pop(request, None)
        inputs, trail = self._inputs.pop(request, []), self._trails.pop(request, [])
        if not trail:
            return
        logs = np.concatenate(trail, axis=1)
        if inputs and logs.shape[1] > 2:
            lessons = self.memory.lessons(logs, self.predictor.horizon)
            self.predictor.learn(np.concatenate(inputs, axis=1), logs, lessons)
        self.memory.add(logs)

    def on_embeddings(self, iteration: Iteration, embeddings: FloatArray) -> Priorities | None:
        self._ahead = None
        self.value.begin(iteration.requests)
        layers, tokens = self.shape.layers, len(embeddings)
        self._weight = max(1.0, tokens / SAMPLE)
        self._sample = np.linspace(0, tokens - 1, min(tokens, SAMPLE)).astype(np.intp)
        self._logs = np.zeros((2 * layers, tokens, self.shape.experts), np.float32)
        context = np.zeros((tokens, self.memory.capacity), np.float32)
        ends = [rows.stop - 1 for rows in iteration.rows()]
        self._lasts = np.flatnonzero(np.isin(self._sample, ends))
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            before = self._said.get(request, self.predictor.usual)
            self._logs[:layers, rows] = before[:, None]
            if request in self._cosines:
                context[rows] = self.memory.context(self._cosines[request])
        context = context[self._sample]
        self.memory.begin(context)
        uses = self.memory.uses(context, 0, layers)
        uses[~context.any(axis=1)] = self.memory.usual
        self._likely[:] = self._probable(0, embeddings[None], uses[None])[0]
        return self._plan(0)

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        assert gates.hidden_states is not None
        self._ahead = self._predicted(iteration, 0, gates.probabilities, gates.hidden_states)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        following, layers = gate.layer + 1, self.shape.layers
        told = self._ahead
        if told is None:
            assert gate.hidden_states is not None
            seen = gate.probabilities[None], gate.hidden_states[None]
            told = self._predicted(iteration, gate.layer, *seen)
        rates, used, near = (part[gate.layer if self._ahead else 0] for part in told)
        self.value.rates[gate.layer] = rates
        self._likely[:] = np.concatenate([used[layers:][:following], used[following:layers]])
        self._likely += (1 if self.memory.is_empty else USUAL) * (self.value.rates - self._likely)
        here = layers - following
        self._likely[following : following + len(near)] = near[:here]
        self._likely[: max(len(near) - here, 0)] = near[here:]
        return self._plan(following)

    def end_iteration(self, iteration: Iteration) -> Priorities | None:
        places = {int(self._sample[place]): place for place in self._lasts}
        for request, rows in zip(iteration.requests, iteration.rows(), strict=True):
            logs = self._logs[self.shape.layers :, rows].copy()
            self._said[request] = logs[:, -1]
            self._trails.setdefault(request, []).append(logs)
            if (place := places.get(rows.stop - 1)) is not None:
                self._cosines[request] = self.memory.cosines[place]
        return self._plan(0)

    def _predicted(
        self, iteration: Iteration, first: int, probabilities: FloatArray, inputs: FloatArray
    ) -> tuple[Table, FloatArray, FloatArray]:
        """Return what S gates from layer `first` on tell.

        Rates of their own layers (S, J), what neighbours used of all (S, 2 L, J), and what is
        likely of the next ones (S, H, J).
        """
        rates = self.value.observe(iteration, first, probabilities)
        said = slice(self.shape.layers + first, self.shape.layers + first + len(probabilities))
        self._logs[said] = logarithms(probabilities)
        alike = self.memory.compare(self._logs[said, self._sample])
        uses = self.memory.uses(alike, 0, 2 * self.shape.layers)
        used = self._joined(1 - uses.swapaxes(1, 2), np.arange(2 * self.shape.layers))
        return rates, used, self._probable(first + 1, inputs, uses)

    def _probable(self, first: int, inputs: FloatArray, uses: FloatArray) -> FloatArray:
        inputs, logs = inputs[:, self._sample], self._logs[:, self._sample]
        return self._joined(*self.predictor.unlikely(first, inputs, logs, uses))

    def _joined(self, unlikely: FloatArray, layers: NDArray[np.intp]) -> FloatArray:
        """Return how likely it is that some token goes to an expert, by (S, layers, T, J).

        To the next token's layers only the last token of each request leads on.
        """
        if len(self._sample) == 1:
            return 1 - unlikely[:, :, 0]
        every = unlikely.prod(axis=2) ** self._weight
        if len(self._lasts) < unlikely.shape[2]:
            following = unlikely[:, :, self._lasts].prod(axis=2)
            every = np.where((layers < self.shape.layers)[..., None], every, following)
        return 1 - every

    def on_load(self, expert: ExpertId) -> None:
        self._absent[expert] = False

    def on_evict(self, expert: ExpertId) -> None:
        self._absent[expert] = True

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        """Least value first."""
        return self._keys

    def _plan(self, following: int) -> Priorities | None:
        """Value all experts before layer `following` runs; ask for the likely ones from it on.

        Of the next token that is as far as predictions reach.
        """
        self._keys = -self.value.of(following, self._likely)
        wanted = (self._likely >= self._threshold) & self._absent
        wanted[max(0, following + self.reach - self.shape.layers) : following] = False
        return np.where(wanted, self._likely * self._nearness[following], 0.0)


class HostPlannerPolicy(PlannerPolicy):
    """The same, but what a gate misses is divided between links and host, as HybriMoE does.

    A copy under way is given up only for a host that is sooner twice.
    """

    def host_experts(self, need: Need) -> list[int]:
        return divided(need, self._machine, self.shape, need.arriving)


def union(rates: list[Table]) -> Table:
    """Return the probability that any of several happens."""
    return rates[0] if len(rates) == 1 else 1 - np.prod([1 - rate for rate in rates], axis=0)


planner = PlannerPolicy  # the name in conf/system
