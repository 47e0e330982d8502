"""Mixtral-Offloading (arXiv 2312.17238): the next layer's gate guesses from this layer's input.

Speculation and cache are those of its paper; its quantisation is left out, so results stay
lossless, and so are the staging buffers of its code, whose place the engine's slots take. The
cache follows src/expert_cache.py of dvmazur/mixtral-offloading: each layer is an eviction group of
its own with as many experts on the device as any other (src/build_model.py), least recently used
first out. As the FineMoE paper runs it (section 6.1), prefetches are synchronous.
"""

from __future__ import annotations

from baselines.speculation import SpeculatingPolicy
from finemoe.offload.policy import ModelShape, Placement

DISTANCE = 1
"""Layers that the guess looks ahead (section 6.1 of the FineMoE paper)."""


class MixtralOffloadPolicy(SpeculatingPolicy):
    """After each gate waits for the top-K that the next gate would choose for the same input."""

    placement = Placement("critical_path", hidden_states=True, awaited=True)

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape, DISTANCE, shape.top_k)
