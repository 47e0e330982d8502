"""Gates that choose experts by other scores than their logits: sigmoids, biases, groups.

What such a gate takes its top K of is handed on in place of its logits, so that a softmax of them
ranks experts as the gate does and everybody sees the same: policies, traces and replays.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finemoe.offload.policy import LEAST_SCORE

SQUASHING = ("sigmoid", "softmax")
MAKING = ("linear", "matmul", "mm")  # functions that make logits
PASSING = ("softmax", "to", "float", "type", "view", "reshape")  # and leave their order as it is


class Ranking(TorchFunctionMode):
    """Keeps what is last ranked within the block, if its order is not that of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self._ranked: Tensor | None = None
        self._like_logits: list[Any] = []
        self._shares: list[Any] = []
        self._squashed = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output, name = func(*args, **kwargs), getattr(func, "__name__", "")
        source = args[0] if args else kwargs.get("input")
        self._squashed |= name in SQUASHING
        if name in MAKING or (name in PASSING and self._knows(source)):
            self._like_logits.append(output)
        if name == "softmax":
            self._shares.append(output)
        if name == "topk":
            self._ranked = None if self._knows(source) else source
        return output

    def _knows(self, value: Any) -> bool:
        return any(value is one for one in self._like_logits)

    def logits(self, told: Tensor) -> Tensor:
        """Return what a softmax turns into the shares of what was ranked, or what a gate told."""
        ranked = told if any(told is one for one in self._shares) else self._ranked
        if ranked is None:
            return told
        scores = ranked.float().reshape(told.shape)
        if not self._squashed:
            return scores
        scores = scores.clamp_min(LEAST_SCORE)
        return (scores / scores.sum(-1, keepdim=True)).log()


def rank_as_chosen(gates: Sequence[Any], index: int, experts: int, hidden: Tensor) -> None:
    """Have gates say what they choose by; `hidden` (1, T, h) is what they are tried with.

    Raises ValueError for gates that choose among others than a layer's experts.
    """
    for gate in gates:
        try:
            with Ranking() as ranking:
                told = gate(hidden)[index]
            width, plain = told.shape[-1], ranking.logits(told) is told
        except TypeError:  # It takes more, such as a bias.
            width, plain = experts, False
        if width != experts:
            raise ValueError(f"gates choose among {width}, and layers have {experts} experts")
        if not plain:
            gate.forward = partial(_told, gate.forward, index)


def is_plain(gate: nn.Module) -> bool:
    """Tell whether a gate chooses by its logits alone."""
    return "forward" not in vars(gate)


def _told(forward: Callable[..., Any], index: int, *inputs: Any, **options: Any) -> Any:
    with Ranking() as ranking:
        output = list(forward(*inputs, **options))
    output[index] = ranking.logits(output[index])
    return tuple(output)
