"""Routing traces: what a model routed, request by request (docs/trace-format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finemoe.offload.policy import GateWeights, ModelShape
from finemoe.offload.routed import RoutedStep

FORMAT = "finemoe-routing-trace"
VERSION = 1

Content = Literal["logits", "embeddings", "hidden_states"]


class TraceError(ValueError):
    """A trace is corrupt, truncated, of another version or model, or lacks what is asked of it."""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says about itself."""

    shape: ModelShape
    dtype: Literal["bfloat16", "float16", "float32"]
    """Of logits, embeddings and hidden states, which are stored as the model computed them."""
    contents: tuple[Content, ...]
    """Which optional arrays every step holds."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model, weights, dataset, seed, versions: whatever says where the routing came from."""
    gates: GateWeights | None = None
    """The model's gates, for systems that apply them to hidden states."""


@dataclass(frozen=True)
class TracedRequest:
    """One request: its tokens and what it routed; `steps[0]` is the prefill."""

    number: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    steps: tuple[RoutedStep, ...]
