"""Routing traces: what a model routed, request by request (docs/trace-format.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from finemoe.offload.policy import GateWeights, ModelShape
from finemoe.offload.routed import RoutedStep

Content = Literal["logits", "embeddings", "hidden_states"]
DType = Literal["bfloat16", "float16", "float32"]


class TraceError(ValueError):
    """A trace is corrupt, truncated, of another version or model, or lacks what is asked of it."""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says about itself."""

    shape: ModelShape
    dtype: DType
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


class Trace(ABC):
    """Requests by number, whatever file they lie in, read one at a time; `len` is how many.

    Use as a context manager. Whatever is wrong with the file raises TraceError, when it is opened
    or when its request is read.
    """

    path: Path
    header: TraceHeader
    _rows: Mapping[int, Any]
    """Where each request lies."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the requests, in the order of the file, ascending if it has no order."""
        return tuple(self._rows)

    def requests(self) -> Iterator[TracedRequest]:
        """Yield the requests in the order of `numbers`."""
        return map(self.request, self.numbers)

    def request(self, number: int) -> TracedRequest:
        """Return one request; its arrays may be views of one buffer each, not to be written to."""
        if number not in self._rows:
            raise self._error(f"has no request {number}, only {len(self)} others")
        return self._request(number)

    @abstractmethod
    def _request(self, number: int) -> TracedRequest: ...

    def _error(self, what: str) -> TraceError:
        return TraceError(f"{self.path}: {what}")

    def require(
        self,
        contents: Sequence[Content] = (),
        gates: bool = False,
        shape: ModelShape | None = None,
        model: str | None = None,
    ) -> None:
        """Raise TraceError if this trace lacks what is asked or is of another model.

        Shapes are compared by L, J and K; by hidden size too if an array that has it is asked for.
        `model` is compared with what the provenance says.
        """
        header = self.header
        named = header.provenance.get("model", "no model that it names")
        if model not in (None, named):
            raise self._error(f"is of {named}, not of {model}; record one of {model}")
        wide = gates or not {"embeddings", "hidden_states"}.isdisjoint(contents)
        if shape is not None and _sizes(shape, wide) != (own := _sizes(header.shape, wide)):
            raise self._error(
                f"is of a model of {own}, not {_sizes(shape, wide)}; "
                "record one of the model that runs"
            )
        missing: list[str] = [name for name in contents if name not in header.contents]
        missing += ["gates"] if gates and header.gates is None else []
        if missing:
            names = ", ".join(missing).replace("_", " ")
            raise self._error(f"holds no {names}, which this run needs; record them too")


def _sizes(shape: ModelShape, wide: bool) -> str:
    sizes = f"{shape.layers} layers, {shape.experts} experts, top {shape.top_k}"
    return f"{sizes}, hidden size {shape.hidden_size}" if wide else sizes
