"""ProMoE (arXiv 2410.22134): layer l + d predicted from layer l's hidden state, in the background.

`predictor=gate` applies layer l + d's own gate to it, as the prototype that the FineMoE paper
compares with (section 6.1); `predictor=learned` a small MLP per layer, trained offline, as the
ProMoE paper does (`python -m experiments.train.predictor`). Its chunked prefetch, early preemption,
and order of experts by arrival are the engine's, and every system has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import validate_call

from baselines.speculation import SpeculatingPolicy, likeliest
from finemoe.expert_map import read_arrays, write_arrays
from finemoe.offload.policy import (
    FloatArray,
    Gate,
    Gates,
    Iteration,
    ModelShape,
    Placement,
    Priorities,
    Table,
)
from finemoe.options import CHECKED, Count, Text, Whole


@dataclass(frozen=True)
class LearnedPredictor:
    """A perceptron of m units for each of S = L - d layers, which scores layer l + d's experts."""

    up: FloatArray  # shape (S, m, h)
    up_bias: FloatArray  # shape (S, m)
    down: FloatArray  # shape (S, J, m)
    down_bias: FloatArray  # shape (S, J)

    def logits(self, source: int | slice, hidden_states: FloatArray) -> FloatArray:
        """Return scores of layer `source` + d's experts: inputs (T, h) to (T, J), or (S, T, h) to
        (S, T, J) for a slice of S sources."""
        up, down = self.up[source].swapaxes(-1, -2), self.down[source].swapaxes(-1, -2)
        units = np.maximum(hidden_states @ up + self.up_bias[source][..., None, :], 0)
        return units @ down + self.down_bias[source][..., None, :]

    def save(self, path: Path, distance: int, facts: Mapping[str, str]) -> None:
        """Write the weights with their stride and what else is to be known of them."""
        write_arrays(path, {**facts, "distance": str(distance)}, vars(self))

    @classmethod
    def load(cls, path: Path, shape: ModelShape, distance: int) -> Self:
        """Read a predictor; ValueError if it is missing, corrupt, or for another model or d."""
        again = f"python -m experiments.train.predictor model=<its name> distance={distance}"
        sources = max(shape.layers - distance, 0)
        try:
            arrays = read_arrays(
                path,
                {"distance": str(distance)},
                up=(sources, "units", shape.hidden_size),
                up_bias=(sources, "units"),
                down=(sources, shape.experts, "units"),
                down_bias=(sources, shape.experts),
            )
        except ValueError as error:
            raise ValueError(f"{error}; train it: {again}") from error
        return cls(*arrays)


class ProMoEPolicy(SpeculatingPolicy):
    """Prefetches the K best experts of each token, and `extra` more, the nearest layer first.

    `prefill` says whether every prompt token predicts, or none, as in its code
    (src/cpp_worker/predictor.cpp), which also has the last layer's output of a decoded token
    predict the first d layers of the next one; here the input of its last MoE block.
    """

    placement = Placement("background", hidden_states=True)

    @validate_call(config=CHECKED)
    def __init__(
        self,
        shape: ModelShape,
        prefetch_distance: Count,  # d: layers from the hidden state to the predicted layer
        predictor: Literal["gate", "learned"] = "gate",
        predictor_path: Text | None = None,
        prefill: Literal["predicted", "code"] = "predicted",
        extra: Whole = 0,
    ) -> None:
        super().__init__(shape, prefetch_distance, shape.top_k + extra)
        self._as_code = prefill == "code"
        self._learned: LearnedPredictor | None = None
        if predictor == "learned":
            if predictor_path is None:
                raise ValueError("predictor=learned needs predictor_path")
            self._learned = LearnedPredictor.load(Path(predictor_path), shape, prefetch_distance)
        self._last: FloatArray | None = None
        """Input (T, h) of the last layer's gate, if the next token's first layers go by it."""

    def predict_ahead(self, iteration: Iteration, gates: Gates) -> None:
        if not self._skips(iteration):
            super().predict_ahead(iteration, gates)

    def on_gate(self, iteration: Iteration, gate: Gate) -> Priorities | None:
        if self._skips(iteration):
            return None
        self._last = gate.hidden_states
        return super().on_gate(iteration, gate)

    def end_iteration(self, iteration: Iteration) -> Priorities | None:
        """By their own gates: no learned predictor has its source in the token before."""
        if not self._as_code or self._last is None:
            return None
        assert self._gates is not None
        logits = self._gates.logits(slice(self._distance), self._last)
        requests = np.zeros((self.shape.layers, self.shape.experts))
        requests[: len(logits)] = self._rank(0, likeliest(logits, self._count))
        self._last = None
        return requests

    def _skips(self, iteration: Iteration) -> bool:
        return self._as_code and iteration.phase == "prefill"

    def _logits(self, first: int, hidden_states: FloatArray) -> FloatArray:
        if self._learned is None:
            return super()._logits(first, hidden_states)
        return self._learned.logits(slice(first, first + len(hidden_states)), hidden_states)

    def _rank(self, first: int, probabilities: Table) -> Table:
        nearness = self.shape.layers - np.arange(first, first + len(probabilities))
        return np.where(probabilities > 0, nearness[:, None] + probabilities, 0.0)


promoe = ProMoEPolicy  # the name in conf/system
