"""Every system serves the same logits, bit for bit, at the tightest sizes of the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from baselines.promoe import LearnedPredictor
from baselines.resident import ResidentPolicy
from experiments.config import build
from experiments.serving import Server
from experiments.small_models import small_model
from experiments.workloads import Request
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome, ModelShape, Policy
from finemoe.recorder import gate_weights
from finemoe.testbed import Testbed
from tests.command import ROOT

SYSTEMS = {
    "finemoe": {},
    "on_demand": {},
    "moe_infinity": {},
    "moe_infinity, code": {"variant": "code"},
    "promoe": {},
    "promoe, learned": {"predictor": "learned"},
    "mixtral_offload": {},
    "deepspeed": {},
}
DISTANCE = 1
OUTPUT = 3


@pytest.fixture(scope="module")
def model() -> OffloadedModel:
    return OffloadedModel.from_model(small_model("mixtral"), torch.device("cpu"))


@pytest.fixture(scope="module")
def predictor(model: OffloadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    shape, sources = model.shape, model.shape.layers - DISTANCE
    draw = np.random.default_rng(0).normal
    up = draw(size=(sources, 8, shape.hidden_size)).astype(np.float32)
    down = draw(size=(sources, shape.experts, 8)).astype(np.float32)
    bias = np.zeros((sources, 8), np.float32), np.zeros((sources, shape.experts), np.float32)
    LearnedPredictor(up, bias[0], down, bias[1]).save(path, DISTANCE, {})
    return path


def configured(system: str, shape: ModelShape, predictor: Path) -> Policy:
    """Return the policy that the system's YAML describes."""
    option = OmegaConf.load(ROOT / "conf" / "system" / f"{system.split(',')[0]}.yaml")
    facts = {"name": "small", "prefetch_distance": DISTANCE}
    cfg = OmegaConf.create({"model": facts, "system": option})
    cfg.system.update(SYSTEMS[system])
    if "learned" in system:
        cfg.system.predictor_path = str(predictor)
    policy: Policy = build(cfg.system, shape=shape)
    return policy


def requests(batch: int, length: int, first: int = 0) -> list[Request]:
    drawn = np.random.default_rng(first).integers(1, 128, (batch, length))
    return [Request(first + n, tuple(row), OUTPUT) for n, row in enumerate(drawn.tolist())]


def emulated(devices: int) -> Testbed:
    cpu = (torch.device("cpu"),) * devices
    return Testbed("test", "emulated", cpu, chunk_bytes=2048, link_gb_s=0.5)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_system_serves_the_residents_logits(
    model: OffloadedModel, predictor: Path, system: str, devices: int, batch: int
) -> None:
    policy = configured(system, model.shape, predictor)
    if policy.placement.hidden_states:
        policy.set_gates(gate_weights(model))
    with resident_runtime(model, policy) as runtime:
        Server(runtime).serve(requests(2, 4, first=10))
        runtime.drain()
    policy.begin_serving()
    one_layers_k = max(model.shape.top_k, devices)
    slots = tuple(len(range(device, one_layers_k, devices)) for device in range(devices))
    stored = model.store.layout.nbytes
    with offloading_runtime(model, policy, emulated(devices), slots, stored) as runtime:
        server = Server(runtime)
        served = []
        for length in (1, 5):
            server.serve(requests(batch, length, first=100 * length))
            served += server.logits
        runtime.drain()
    runtime.residency.cache.check_integrity()
    with resident_runtime(model, ResidentPolicy(model.shape)) as runtime:
        server = Server(runtime)
        expected = []
        for length in (1, 5):
            server.serve(requests(batch, length, first=100 * length))
            expected += server.logits
    assert len(served) == 2 * OUTPUT
    assert all(torch.equal(a, b) for a, b in zip(served, expected, strict=True))


def outcomes(model: OffloadedModel, policy: Policy, slots: int) -> list[LayerOutcome]:
    """Serve one request of one prompt token and return how its experts were found."""
    found: list[LayerOutcome] = []
    stored = model.store.layout.nbytes
    with offloading_runtime(model, policy, emulated(1), (slots,), stored) as runtime:
        runtime.listeners.append(found.append)
        Server(runtime).serve(requests(1, 1))
    return found


def test_deepspeed_misses_nothing_and_waits_if_a_layer_fits(
    model: OffloadedModel, predictor: Path
) -> None:
    policy = configured("deepspeed", model.shape, predictor)
    fits = outcomes(model, policy, slots=model.shape.experts)
    assert all(outcome.hits == outcome.activated for outcome in fits)
    policy = configured("deepspeed", model.shape, predictor)
    short = outcomes(model, policy, slots=model.shape.top_k)
    assert any(outcome.late for outcome in short)
    assert not any(outcome.misses for outcome in short)


def test_awaited_guesses_are_there_or_were_not_asked_for(
    model: OffloadedModel, predictor: Path
) -> None:
    policy = configured("mixtral_offload", model.shape, predictor)
    policy.set_gates(gate_weights(model))
    found = outcomes(model, policy, slots=8)
    assert all(not outcome.late for outcome in found)
    assert sum(len(outcome.hits) for outcome in found) > 0
