"""The offline workload: which prompts prepare a system, which are measured (section 6.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from experiments.errors import UserError
from experiments.run.datasets import PromptSet
from finemoe.options import CHECKED, Count, Number, Whole


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to generate for it, end-of-text or not."""

    number: int
    prompt: tuple[int, ...]
    output_tokens: int


@checked(frozen=True, config=CHECKED)
class OfflineSettings:
    """What conf/workload/offline.yaml sets."""

    prompts: Count
    history_share: Annotated[Number, Field(ge=0, lt=1)]
    input_tokens: Count
    output_tokens: Count
    batch_size: Count
    history_batch_size: Count
    warmup: Whole
    repeats: Count


@dataclass(frozen=True)
class OfflineWorkload:
    """Requests that fill a system's history, those that warm the cache, those measured."""

    history: tuple[Request, ...]
    warmup: tuple[Request, ...]
    measured: tuple[Request, ...]


def offline(prompts: PromptSet, settings: OfflineSettings, seed: int) -> OfflineWorkload:
    """Number the prompts in an order drawn by seed and `split` them.

    Warm-up requests come from the history, so nothing measured is seen before.
    """
    order = list(range(len(prompts.prompts)))
    random.Random(seed).shuffle(order)
    tokens = settings.output_tokens
    requests = [Request(n, prompts.prompts[i], tokens) for n, i in enumerate(order)]
    return split(requests, settings)


def split(requests: Sequence[Request], settings: OfflineSettings) -> OfflineWorkload:
    """Let the first `history_share` of the requests prepare the system, the others be measured.

    Raises UserError if that leaves nothing to measure, or nothing to warm up with.
    """
    share = settings.history_share
    cut = round(share * len(requests))
    if cut == len(requests):
        raise UserError(
            f"workload.history_share={share} of {len(requests)} prompts leaves none to measure"
        )
    history, measured = tuple(requests[:cut]), tuple(requests[cut:])
    if settings.warmup and not history:
        raise UserError("a warm-up needs history prompts; set workload.warmup=0")
    warmup = tuple(history[i % len(history)] for i in range(settings.warmup))
    return OfflineWorkload(history, warmup, measured)
