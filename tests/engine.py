"""Engines of a test's size: small models, testbeds, requests, and policies as runs build them."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer

from baselines.on_demand import OnDemandPolicy
from experiments.run.config import build
from experiments.run.live import LiveBackend
from experiments.run.models import COMMON, FAMILIES, random_model
from experiments.run.schedule import FixedBatches, Request, Served, Server
from experiments.run.weights import SCALE_MODELS
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload.live import LiveRuntime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome, Machine, ModelShape, Policy, Routing
from finemoe.recorder import Recorder, gate_weights
from finemoe.testbed import Testbed
from finemoe.trace import TracedRequest
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
        "memory": [0, 2, 64],
        "ridge": [0.1, 1.0],
    },
    "deepspeed": {},
    "on_demand": {},
    "lfu": {"counts": ["kept", "forgotten"]},
    "lfru": {},
    "class_lru": {},
    "least_stale": {"order": ["fifo", "next_visit"]},
    "fiddler": {},
    "freetoken": {},
    "planner_host": {"horizon": [1, 3]},
    "hybrimoe": {"alpha": [0.5, 1.0], "ahead": [1, 3]},
    "belady": {},
    "oracle": {"lookahead": [1, 64]},
}
"""Every system that the engine serves, and options of each that are worth trying."""


class Clock:
    """Stands for the module `time`: it passes when somebody sleeps or, by `look`, looks at it."""

    def __init__(self, look: float = 0.0) -> None:
        self.now, self.look = 100.0, look

    def perf_counter(self) -> float:
        self.now += self.look
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def offloaded(
    family: str = "mixtral", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any
) -> OffloadedModel:
    facts = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **config})
    return OffloadedModel.from_model(random_model(facts, dtype, seed), CPU)


def saved_mixtral(folder: Path, layers: int, intermediate: int = 16) -> Path:
    """Save a random Mixtral of 4 experts, top-2, in shards, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    sizes = {"hidden_size": 16, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    facts = AutoConfig.for_model("mixtral", vocab_size=len(tokenizer), **sizes, **heads)
    random_model(facts, torch.bfloat16, seed=0).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


def tiny(folder: Path, intermediate: int = 16) -> list[str]:
    """Return overrides with which run.py serves a saved Mixtral of 3 layers."""
    weights = saved_mixtral(folder, 3, intermediate)
    facts = {"layers": 3, "experts": 4, "hidden_size": 16, "expert_intermediate_size": intermediate}
    return [f"weights='{weights}'", *(f"model.{name}={value}" for name, value in facts.items())]


def into_cache(hub: Path, name: str, model: Path) -> None:
    """Put a saved model into a cache of the hub, as its only revision."""
    cached, revision = hub / f"models--{name}", "a" * 40
    shutil.copytree(model, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)


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


def machine(slots: tuple[int, ...]) -> Machine:
    """Return one on which the host is sooner for a token or two, and of some experts for more."""
    return Machine(slots, load=4.0, host=lambda tokens: 2.0 * tokens, device=lambda tokens: 1.0)


def offloading(
    model: OffloadedModel,
    policy: Policy,
    slots: tuple[int, ...],
    timeline: Any = None,
    protect: bool = False,
    testbed: Testbed | None = None,
    **links: Any,
) -> LiveRuntime:
    """Return a runtime with so many slots on each device, emulated by `links` if none is given."""
    testbed, nbytes = testbed or emulated(len(slots), **links), model.store.layout.nbytes
    if policy.set_machine:
        policy.set_machine(machine(slots))
    return offloading_runtime(model, policy, testbed, slots, nbytes, timeline, protect)


def requests(batch: int, length: int, first: int = 0, output: int = 3) -> list[Request]:
    drawn = np.random.default_rng(first).integers(1, 128, (batch, length))
    return [Request(first + n, tuple(row), output) for n, row in enumerate(drawn.tolist())]


def serve(runtime: Any, *batches: list[Request], **options: Any) -> list[Served]:
    """Serve batches of requests through a runtime, each of them together; see `LiveBackend`."""
    server = Server(LiveBackend(runtime, **options))
    return [one for batch in batches for one in server.serve(FixedBatches(batch, len(batch)))]


def logits_of(runtime: Any, *batches: list[Request], **options: Any) -> list[torch.Tensor]:
    """Serve batches through a runtime; return each step's logits on the host, (B, vocabulary)."""
    backend, logits = LiveBackend(runtime, **options), list[torch.Tensor]()
    server = Server(backend, listeners=[lambda _: logits.append(backend.logits)])
    for batch in batches:
        list(server.serve(FixedBatches(batch, len(batch))))
    return [one.cpu() for one in logits]


def recorded(
    model: OffloadedModel, *batches: list[Request]
) -> tuple[dict[int, TracedRequest], Routing]:
    """Serve batches, all experts resident; return what each request and iteration routes."""
    routing = list[list[tuple[int, ...]]]()

    def listen(outcome: LayerOutcome) -> None:
        if outcome.layer == 0:
            routing.append([])
        routing[-1].append(outcome.activated)

    runtime, recorder = resident_runtime(model, OnDemandPolicy(model.shape)), Recorder(model)
    with runtime, recorder:
        runtime.listeners.append(listen)
        served = serve(runtime, *batches, before=lambda step: recorder.begin(step.iteration))
        return {
            one.request.number: recorder.finish(one.request.number, one.request.prompt, one.tokens)
            for one in served
        }, routing


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
    if policy.set_machine:
        policy.set_machine(machine((model.shape.size,)))
    if history and policy.placement.prediction != "none":
        with resident_runtime(model, policy) as runtime:
            serve(runtime, requests(2, 4, first=50))
            runtime.drain()
    policy.begin_serving()
    return policy
