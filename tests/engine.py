"""Engines of a test's size: small models, testbeds, requests, and policies as runs build them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer

from experiments.run.config import build
from experiments.run.live import LiveBackend
from experiments.run.schedule import FixedBatches, Request, Served, Server
from experiments.run.small_models import random_model, small_model
from experiments.run.weights import SCALE_MODELS
from finemoe.assemble import resident_runtime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import Iteration, LayerOutcome, ModelShape, Policy, Priorities
from finemoe.offload.residency import Residency
from finemoe.recorder import gate_weights
from finemoe.testbed import Testbed
from tests.command import ROOT

CPU = torch.device("cpu")
DISTANCE = 1
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "finemoe": {
        "prefetch_distance": [1, 2, 3],
        "store_capacity": [1, 4],
        "variant": ["paper", "demo"],
        "search": ["both", "semantic", "trajectory"],
        "selection": ["delta", "top_k"],
        "eviction": ["finemoe", "demo", "lru", "lfu"],
        "horizon": ["single", "all", "demo"],
        "aggregation": ["mean", "token", "demo"],
        "online_growth": [True, False],
        "asynchronous": [True, False],
    },
    "moe_infinity": {
        "early_layers": [1, 3],
        "capacity": [1, 4],
        "variant": ["paper", "code"],
        "eviction": ["lfu", "scheduler", "activation", "lru"],
        "prefetching": ["asynchronous", "awaited", "awaited_next_layer", "awaited_at_distance"],
        "horizon": [None, 1],
        "online_growth": [True, False],
    },
    "promoe": {"prefetch_distance": [1, 2, 3], "prefill": ["predicted", "code"], "extra": [0, 1]},
    "mixtral_offload": {"prefetching": ["awaited", "asynchronous"], "experts": [None, 1]},
    "in_searcher": {
        "predictor": ["speculation", "hit_count"],
        "prefetch_distance": [1, 3],
        "eviction": ["lru", "lfu"],
    },
    "planner": {
        "horizon": [1, 3, 10],
        "threshold": [0.1, 0.4],
        "discount": [0.5, 0.95, 1.0],
        "recency": [0.2, 1.0],
        "ridge": [0.1, 1.0],
    },
    "deepspeed": {},
    "on_demand": {},
    "lfu": {"counts": ["kept", "forgotten"]},
    "lfru": {},
    "belady": {},
    "oracle": {"lookahead": [1, 64]},
}
"""Every system that the engine serves, and options of each that are worth trying."""


def offloaded(
    family: str = "mixtral", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> OffloadedModel:
    return OffloadedModel.from_model(small_model(family, dtype, seed), CPU)


def saved_mixtral(folder: Path, layers: int, intermediate: int = 16) -> Path:
    """Save a random Mixtral of 4 experts, top-2, in shards, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    sizes = {"hidden_size": 16, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    facts = AutoConfig.for_model("mixtral", vocab_size=len(tokenizer), **sizes, **heads)
    random_model(facts, torch.bfloat16, seed=0).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


def page_locks(monkeypatch: pytest.MonkeyPatch, limit: int) -> dict[int, int]:
    """Let CUDA's runtime lock up to `limit` blocks of host memory; return those that are locked."""
    locked: dict[int, int] = {}

    def register(address: int, nbytes: int, flags: int) -> int:
        if len(locked) == limit:
            return 2
        locked[address] = nbytes
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return locked


def emulated(devices: int = 1, link_gb_s: float = 0.5, chunk_bytes: int = 2048) -> Testbed:
    return Testbed("test", "emulated", (CPU,) * devices, chunk_bytes, link_gb_s)


def breaches(residency: Residency) -> list[tuple[int, int]]:
    """Watch what `protect` promises; return who broke it, (victim, incoming), as it happens.

    What is asked for before its layer's gate speaks leaves for no prefetch, and on demand only if
    nobody else can.
    """
    shape = residency.shape
    cache, asked, found = residency.cache, set[int](), list[tuple[int, int]]()
    now = (-1, -1)
    begin, prefetch, gate = residency.begin_iteration, residency.prefetch, residency.gate
    reserve = cache.reserve

    def begun(iteration: Iteration) -> None:
        nonlocal now
        now = (iteration.number, -1)
        begin(iteration)

    def prefetched(number: int, priorities: Priorities | None, *hook: Any) -> None:
        # A faulty answer is refused by the engine.
        if priorities is not None and np.shape(priorities) == (shape.layers, shape.experts):
            layers, _ = priorities.nonzero()
            wanted = priorities.reshape(-1).nonzero()[0].tolist()
            asked.update(
                flat
                for flat, layer in zip(wanted, layers.tolist(), strict=True)
                if (number, layer) > now
            )
        prefetch(number, priorities, *hook)

    def gated(iteration: Iteration, layer: int, activated: tuple[int, ...]) -> LayerOutcome:
        nonlocal now
        now = (iteration.number, layer)
        asked.difference_update([f for f in asked if residency.experts[f].layer == layer])
        return gate(iteration, layer, activated)

    def reserved(flat: int, urgent: bool) -> int:
        device = cache.device_of(flat)
        movable = {
            other
            for other in range(device, residency.shape.size, len(cache.slots))
            if cache.is_resident(other) and not cache.is_pinned(other)
        }
        victim = reserve(flat, urgent)
        if victim in asked and not (urgent and movable <= asked):
            found.append((victim, flat))
        return victim

    # Of a compiled engine nothing can be replaced; its sources are watched where interpreted.
    with suppress(AttributeError):
        for name, watched in (
            ("begin_iteration", begun),
            ("prefetch", prefetched),
            ("gate", gated),
        ):
            setattr(residency, name, watched)
        setattr(cache, "reserve", reserved)  # noqa: B010
    return found


def requests(batch: int, length: int, first: int = 0, output: int = 3) -> list[Request]:
    drawn = np.random.default_rng(first).integers(1, 128, (batch, length))
    return [Request(first + n, tuple(row), output) for n, row in enumerate(drawn.tolist())]


def serve(runtime: Any, *batches: list[Request], **options: Any) -> list[Served]:
    """Serve batches of requests through a runtime, each of them together; see `LiveBackend`."""
    server = Server(LiveBackend(runtime, **options))
    return [one for batch in batches for one in server.serve(FixedBatches(batch, len(batch)))]


def logits_of(runtime: Any, batch: list[Request], **options: Any) -> list[torch.Tensor]:
    """Serve a batch through a runtime; return each step's logits, shape (B, vocabulary)."""
    backend, logits = LiveBackend(runtime, **options), list[torch.Tensor]()
    server = Server(backend, listeners=[lambda _: logits.append(backend.logits)])
    list(server.serve(FixedBatches(batch, len(batch))))
    return logits


def configured(system: str, shape: ModelShape, **options: Any) -> Policy:
    """Return the policy that a system's YAML describes, with options changed."""
    facts = {"name": "small", "prefetch_distance": DISTANCE}
    option = OmegaConf.load(ROOT / "conf" / "system" / f"{system}.yaml")
    reading = OmegaConf.load(ROOT / "conf" / "reading" / "prototype.yaml")
    cfg = OmegaConf.create({"model": facts, "system": option, "reading": reading})
    cfg.system.update(options)
    policy: Policy = build(cfg.system, shape=shape)
    return policy


def prepared(policy: Policy, model: OffloadedModel, history: bool = True) -> Policy:
    """Give a policy the gates and the history of two requests, as a run does before it serves."""
    if policy.set_gates:
        policy.set_gates(gate_weights(model))
    if history and policy.placement.prediction != "none":
        with resident_runtime(model, policy) as runtime:
            serve(runtime, requests(2, 4, first=50))
            runtime.drain()
    policy.begin_serving()
    return policy
