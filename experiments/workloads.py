"""The offline workload: which prompts prepare a system, which are measured (section 6.1)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from experiments.datasets import PromptSet
from experiments.errors import UserError


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to generate for it, end-of-text or not."""

    number: int
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class OfflineWorkload:
    """Requests that fill a system's history, and those that are measured, in batches."""

    history: tuple[Request, ...]
    measured: tuple[Request, ...]


def offline(
    prompts: PromptSet, history_share: float, output_tokens: int, seed: int
) -> OfflineWorkload:
    """Split prompts by seed: `history_share` of them prepare the system, the rest is measured.

    Raises UserError if the split leaves nothing to measure.
    """
    if output_tokens < 1:
        raise UserError(f"output_tokens={output_tokens}: generate at least one token")
    order = list(range(len(prompts.prompts)))
    random.Random(seed).shuffle(order)
    requests = [Request(n, prompts.prompts[i], output_tokens) for n, i in enumerate(order)]
    cut = round(history_share * len(requests))
    if not 0 <= history_share < 1 or cut == len(requests):
        raise UserError(
            f"history_share={history_share} of {len(requests)} prompts leaves none to measure"
        )
    return OfflineWorkload(tuple(requests[:cut]), tuple(requests[cut:]))
