"""What computation costs on an accelerator that is not there: a roofline over full-size shapes.

A part takes the longer of moving its bytes and doing its arithmetic (Williams, Waterman, Patterson,
"Roofline", CACM 52(4), 2009), plus a fixed time for each kernel that it launches. docs/testbeds.md
has the formulae and where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic.dataclasses import dataclass

from finemoe.offload.replay import IterationCosts, PredictionCosts, ThreadCosts
from finemoe.options import CHECKED, Count, Micros, Rate, Share, Whole

START_KERNELS = 14
"""Kernels before the first layer, counted in a decode step of transformers 5.23: embedding, rotary
tables."""
DENSE_KERNELS = 45
"""Kernels of a layer outside its routed experts, counted likewise: 41 in Mixtral, 49 in
Qwen1.5-MoE, 43 in Phi-3.5-MoE."""
EXPERT_KERNELS = 7
"""Kernels of one routed expert: two products, activation, product, weighing, cast, sum."""
FINISH_KERNELS = 9
"""Kernels after the last layer, counted likewise: final norm, head, choice of the token."""

ITERATIONS_REMEMBERED = 1 << 16


@dataclass(frozen=True, config=CHECKED)
class Accelerator:
    """One device: what its datasheet promises, and the share of it that programs get."""

    memory_gb_s: Rate
    """Nominal bandwidth of its memory, 10^9 bytes per second."""
    matrix_tflops: Rate
    """Nominal rate of dense bf16 products that accumulate in fp32, 10^12 operations per second."""
    memory_gb: Rate
    """Size of its memory, 10^9 bytes."""
    memory_efficiency: Share
    matrix_efficiency: Share
    kernel_us: Micros
    """What every kernel launch adds, in microseconds."""
    sync_us: Micros
    """What the host waits to read a small result, in microseconds."""

    def seconds(self, nbytes: float, flops: float, kernels: int) -> float:
        """Return how long `kernels` take that move `nbytes` and do `flops` operations."""
        moving = nbytes / (self.memory_gb_s * 1e9 * self.memory_efficiency)
        computing = flops / (self.matrix_tflops * 1e12 * self.matrix_efficiency)
        return max(moving, computing) + kernels * self.kernel_us * 1e-6


@dataclass(frozen=True, config=CHECKED)
class FullSizeModel:
    """Shapes of the real model, whichever weights stand in for it (conf/model)."""

    layers: Count
    experts: Count
    top_k: Count
    hidden_size: Count
    expert_intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    shared_expert_intermediate_size: Whole
    """Width of the experts that every token goes to; 0 if there are none."""
    vocab_size: Count
    bytes_per_parameter: Count = 2

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's query, key, value and output projections."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * heads * self.head_dim

    @property
    def shared_parameters(self) -> int:
        """Parameters of one layer's shared experts."""
        return 3 * self.hidden_size * self.shared_expert_intermediate_size

    @property
    def router_parameters(self) -> int:
        return self.hidden_size * self.experts

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: gate, up and down projections."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head; the token embedding has as many."""
        return self.hidden_size * self.vocab_size

    @property
    def dense_bytes(self) -> int:
        """Bytes of what is never offloaded, norms and biases left out."""
        layer = self.attention_parameters + self.shared_parameters + self.router_parameters
        return (self.layers * layer + 2 * self.head_parameters) * self.bytes_per_parameter

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert."""
        return self.expert_parameters * self.bytes_per_parameter


class RooflineCosts:
    """The cost model of a simulated testbed (`finemoe.offload.replay.CostModel`).

    Everything but routed experts runs on one device; experts run on the device that holds them.
    `collect` and `hop` are in seconds; `hop` counts with several devices only.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: FullSizeModel,
        prediction: PredictionCosts,
        devices: int = 1,
        collect: float = 0.0,
        hop: float = 0.0,
        prediction_source: str = "",
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.prediction = prediction
        self.prediction_source = prediction_source
        self.parallel = devices > 1
        self.collect = collect + accelerator.sync_us * 1e-6
        self.hop = hop if self.parallel else 0.0
        self.thread = ThreadCosts()
        self._expert = lru_cache(maxsize=None)(self._price_expert)
        self._iteration = lru_cache(ITERATIONS_REMEMBERED)(self._price_iteration)

    def iteration(self, tokens: Sequence[int], contexts: Sequence[int]) -> IterationCosts:
        """Return the costs for a batch: each request's tokens now, and those it attends to.

        Raises ValueError if the two differ in length.
        """
        return self._iteration(tuple(tokens), tuple(contexts))

    def expert(self, tokens: int) -> float:
        """Return the seconds of one expert's computation for `tokens` tokens."""
        return self._expert(tokens)

    def _price_expert(self, tokens: int) -> float:
        return self._product(self.model.expert_parameters, tokens, EXPERT_KERNELS)

    def _price_iteration(
        self, tokens: tuple[int, ...], contexts: tuple[int, ...]
    ) -> IterationCosts:
        model, sync = self.model, self.accelerator.sync_us * 1e-6
        rows = sum(tokens)
        embedding = rows * model.hidden_size * model.bytes_per_parameter
        dense = (
            self._product(model.attention_parameters, rows, DENSE_KERNELS)
            + self._attention(tokens, contexts)
            + self._product(model.shared_parameters, rows)
            + self._product(model.router_parameters, rows)
        )
        return IterationCosts(
            start=self.accelerator.seconds(embedding, 0, START_KERNELS) + sync,
            dense=dense + sync,
            finish=self._product(model.head_parameters, len(tokens), FINISH_KERNELS) + sync,
        )

    def _product(self, parameters: int, rows: int, kernels: int = 0) -> float:
        """Return the seconds in which `rows` are multiplied with weights that are read once."""
        nbytes = parameters * self.model.bytes_per_parameter
        return self.accelerator.seconds(nbytes, 2 * parameters * rows, kernels)

    def _attention(self, tokens: tuple[int, ...], contexts: tuple[int, ...]) -> float:
        """Return the seconds in which one layer reads its keys and values and attends causally."""
        model = self.model
        pairs = sum(t * c - t * (t - 1) // 2 for t, c in zip(tokens, contexts, strict=True))
        cached = 2 * model.num_key_value_heads * model.head_dim * model.bytes_per_parameter
        flops = 4 * model.num_attention_heads * model.head_dim * pairs
        return self.accelerator.seconds(cached * sum(contexts), flops, 0)
