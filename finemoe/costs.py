"""What computation costs in virtual time: a roofline over full-size shapes, or measured lines.

In the roofline, a part takes the longer of moving its bytes and doing its arithmetic (Williams,
Waterman, Patterson, "Roofline", CACM 52(4), 2009), plus a fixed time for each kernel that it
launches. docs/testbeds.md has the formulae and where the numbers come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import validate_call
from pydantic.dataclasses import dataclass as checked_dataclass

from finemoe.offload.runtime import CostModel, IterationCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.options import CHECKED, Bytes, Count, Flag, Micros, Rate, Share, Whole

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


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class Processor:
    """A device or a host: what its datasheet promises, and the share of it that programs get."""

    memory_gb_s: Rate  # nominal bandwidth of its memory, 10^9 bytes per second
    matrix_tflops: Rate
    """Nominal rate of dense bf16 products that accumulate in fp32, 10^12 operations per second."""
    memory_efficiency: Share
    matrix_efficiency: Share
    kernel_us: Micros  # what every kernel launch adds

    def seconds(self, nbytes: float, flops: float, kernels: int) -> float:
        """Return how long `kernels` take that move `nbytes` and do `flops` operations."""
        moving = nbytes / (self.memory_gb_s * 1e9 * self.memory_efficiency)
        computing = flops / (self.matrix_tflops * 1e12 * self.matrix_efficiency)
        return max(moving, computing) + kernels * self.kernel_us * 1e-6


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class Accelerator(Processor):
    """One device."""

    memory_gb: Rate
    sync_us: Micros  # what the host waits to read a small result


@dataclass(frozen=True)
class ModelSizes:
    """What the real model weighs, whichever weights stand in for it."""

    layers: int  # those with experts
    experts: int
    top_k: int
    hidden_size: int
    bytes_per_parameter: int
    expert_bytes: int  # of one routed expert
    head_bytes: int
    dense_bytes: int  # of what is never offloaded
    layer_parts: tuple[float, ...]
    """Parameters, product by product, that a MoE layer reads outside routed experts."""
    cached: int  # numbers that an attention layer keeps of each token: its keys and values
    attended: int  # width of heads' queries and values; two operations each for a pair of tokens
    attention_share: float = 1.0  # attention layers per MoE layer
    layer_kernels: int = DENSE_KERNELS  # of as many layers as come with one MoE layer

    @property
    def expert_parameters(self) -> float:
        return self.expert_bytes / self.bytes_per_parameter


@validate_call(config=CHECKED)
def published_sizes(
    layers: Count,
    experts: Count,
    top_k: Count,
    hidden_size: Count,
    expert_intermediate_size: Count,
    num_attention_heads: Count,
    num_key_value_heads: Count,
    head_dim: Count,
    shared_expert_intermediate_size: Whole,  # of those that every token goes to; 0: there are none
    vocab_size: Count,
    bytes_per_parameter: Count = 2,
) -> ModelSizes:
    """Return the sizes that follow from a model's published shapes, norms and biases left out."""
    heads = 2 * num_attention_heads + 2 * num_key_value_heads
    # Attention, shared experts, router.
    widths = heads * head_dim, 3 * shared_expert_intermediate_size, experts
    parts = tuple(hidden_size * width for width in widths)
    head = hidden_size * vocab_size  # The token embedding has as many.
    return ModelSizes(
        *(layers, experts, top_k, hidden_size, bytes_per_parameter),
        expert_bytes=3 * hidden_size * expert_intermediate_size * bytes_per_parameter,
        head_bytes=head * bytes_per_parameter,
        dense_bytes=(layers * sum(parts) + 2 * head) * bytes_per_parameter,
        layer_parts=parts,
        cached=2 * num_key_value_heads * head_dim,
        attended=2 * num_attention_heads * head_dim,
    )


@validate_call(config=CHECKED)
def counted_sizes(
    layers: Count,
    experts: Count,
    top_k: Count,
    hidden_size: Count,
    expert_bytes: Count,
    dense_bytes: Bytes,  # of all but routed experts
    embedding_bytes: Bytes,
    head_bytes: Bytes,
    tied: Flag,  # whether embedding and head are one tensor
    depth: Count,  # layers of all kinds
    attention_layers: Whole,  # layers whose cache grows with every token
    cached: Count,
    attended: Count,
    bytes_per_parameter: Count,
) -> ModelSizes:
    """Return the sizes of a model whose parameters were counted, whatever its layers are made of.

    What is neither a routed expert nor embedding or head, dense layers, linear attention and Mamba
    included, is spread evenly over the MoE layers. Windows and recurrent states are left out.
    """
    spread = dense_bytes - embedding_bytes - head_bytes * (not tied)
    return ModelSizes(
        *(layers, experts, top_k, hidden_size, bytes_per_parameter),
        expert_bytes=expert_bytes,
        head_bytes=head_bytes,
        dense_bytes=dense_bytes,
        layer_parts=(spread / layers / bytes_per_parameter,),
        cached=cached,
        attended=attended,
        attention_share=attention_layers / layers,
        layer_kernels=round(DENSE_KERNELS * depth / layers),
    )


@dataclass(frozen=True)
class RooflineCosts(CostModel):
    """A full-size model on an accelerator; all but routed experts runs on one device."""

    accelerator: Accelerator
    model: ModelSizes
    layer: float = 0.0  # seconds that a host adds to each layer
    processor: Processor | None = None  # of the host, if anybody says how fast it is
    link: LinkRate | None = None  # over which tokens go to the host and back

    def iteration(self, tokens: Sequence[int], contexts: Sequence[int]) -> IterationCosts:
        """See `CostModel`; ValueError if the two differ in length."""
        model, rows = self.model, sum(tokens)
        sync = self.accelerator.sync_us * 1e-6
        embedding = rows * model.hidden_size * model.bytes_per_parameter
        head = model.head_bytes / model.bytes_per_parameter
        first, *others = model.layer_parts
        dense = self._product(first, rows, model.layer_kernels) + self._attention(tokens, contexts)
        for part in others:
            dense += self._product(part, rows)
        return IterationCosts(
            start=self.accelerator.seconds(embedding, 0, START_KERNELS) + sync,
            dense=dense + sync + self.layer,
            finish=self._product(head, len(tokens), FINISH_KERNELS) + sync,
        )

    def expert(self, tokens: int) -> float:
        return self._product(self.model.expert_parameters, tokens, EXPERT_KERNELS)

    def host(self, tokens: int) -> float:
        if self.processor is None or self.link is None:
            return super().host(tokens)
        moved = tokens * self.model.hidden_size * self.model.bytes_per_parameter
        way = self.link.latency + moved / self.link.bytes_per_second
        parameters = self.model.expert_parameters
        return self._product(parameters, tokens, EXPERT_KERNELS, self.processor) + 2 * way

    def _product(
        self, parameters: float, rows: int, kernels: int = 0, on: Processor | None = None
    ) -> float:
        """Return the seconds in which `rows` are multiplied with weights that are read once."""
        nbytes = parameters * self.model.bytes_per_parameter
        return (on or self.accelerator).seconds(nbytes, 2 * parameters * rows, kernels)

    def _attention(self, tokens: Sequence[int], contexts: Sequence[int]) -> float:
        """Return the seconds in which one layer reads its keys and values and attends causally."""
        model = self.model
        pairs = sum(t * c - t * (t - 1) // 2 for t, c in zip(tokens, contexts, strict=True))
        cached = model.cached * model.bytes_per_parameter * model.attention_share
        flops = 2 * model.attended * pairs * model.attention_share
        return self.accelerator.seconds(cached * sum(contexts), flops, 0)


@dataclass(frozen=True)
class Line:
    """Seconds of an operation: `base`, and more for every token it computes or attends to."""

    base: float
    per_token: float = 0.0
    per_context: float = 0.0

    def at(self, tokens: int, context: int = 0) -> float:
        return self.base + self.per_token * tokens + self.per_context * context


@dataclass(frozen=True)
class LinearCosts(CostModel):
    """The costs of one model on one machine, as lines through measurements."""

    start: Line
    dense: Line
    finish: Line
    expert_line: Line

    def iteration(self, tokens: Sequence[int], contexts: Sequence[int]) -> IterationCosts:
        lines = (self.start, self.dense, self.finish)
        return IterationCosts(*(line.at(sum(tokens), sum(contexts)) for line in lines))

    def expert(self, tokens: int) -> float:
        return self.expert_line.at(tokens)
