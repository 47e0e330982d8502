"""What a run record says, whichever runtime served: one schema for every mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.run.datasets import PromptSet
from experiments.run.metrics import AccessCounter, latency_summary, request_table
from experiments.run.records import provenance
from experiments.run.serving import Served
from experiments.run.setup import Engine
from experiments.run.weights import fingerprint
from finemoe.offload.bounds import Roofline
from finemoe.offload.runtime import PhaseSeconds
from finemoe.offload.transfer import Traffic


@dataclass
class Measurement:
    """What serving the measured requests left behind, over all repeats."""

    served: list[Served] = field(default_factory=list)
    accesses: AccessCounter = field(default_factory=AccessCounter)
    traffic: Traffic = field(default_factory=Traffic)
    phases: PhaseSeconds = field(default_factory=PhaseSeconds)
    peak_occupied: int = 0
    busy_seconds: float = 0.0
    """Time during which requests were served."""
    same_as_reference: bool | None = None
    """Whether every step's logits equal the reference's bit for bit; None if not verified."""


@dataclass(frozen=True)
class RunFacts:
    """What a record says about a run apart from its config and its measurement."""

    mode: str
    testbed: str
    routing: str
    dataset: str
    dataset_source: str
    dataset_sha256: str
    budget_bytes: int
    slots: tuple[int, ...]
    expert_bytes: int
    stored_expert_bytes: int
    dense_bytes: int
    time_scale: float
    history: str
    history_bytes: dict[str, int]
    bound: Roofline | None
    online: Mapping[str, Any] | None = None
    """What is said of requests that arrive over time."""
    positions: int | None = None
    """For how many tokens of prompt and answer the model was made."""
    prediction_costs: str | None = None
    """Of which system and model a simulation's prediction costs were measured."""


def live_facts(
    engine: Engine,
    prompts: PromptSet,
    history: str,
    bound: Roofline | None = None,
    online: Mapping[str, Any] | None = None,
) -> RunFacts:
    """Return the facts of a live run."""
    model = engine.model
    return RunFacts(
        mode=engine.testbed.mode,
        testbed=engine.testbed.name,
        routing="the model's own gates",
        dataset=prompts.dataset,
        dataset_source=prompts.source,
        dataset_sha256=prompts.sha256,
        budget_bytes=engine.budget_bytes,
        slots=engine.slots,
        expert_bytes=model.full_expert_bytes,
        stored_expert_bytes=model.offloaded.store.layout.nbytes,
        dense_bytes=model.offloaded.dense_bytes,
        time_scale=engine.testbed.time_scale,
        history=history,
        history_bytes=engine.policy.history.memory_bytes() if engine.policy.history else {},
        positions=model.positions,
        bound=bound,
        online=online,
    )


def run_record(cfg: DictConfig, facts: RunFacts, measurement: Measurement) -> dict[str, Any]:
    """Return the run record; bytes are those of full-size experts, times are in seconds."""
    return {
        "status": "complete",
        "mode": facts.mode,
        "testbed": facts.testbed,
        "system": cfg.system.label,
        "model": cfg.model.name,
        "weights": str(cfg.weights),
        "weights_fingerprint": fingerprint(cfg.model, str(cfg.weights), cfg.seed),
        "routing": facts.routing,
        "dataset": facts.dataset,
        "dataset_source": facts.dataset_source,
        "dataset_sha256": facts.dataset_sha256,
        "memory_budget_gb": facts.budget_bytes / 1e9,
        "slots": list(facts.slots),
        "expert_bytes": facts.expert_bytes,
        "stored_expert_bytes": facts.stored_expert_bytes,
        "time_scale": facts.time_scale,
        "seed": cfg.seed,
        "history": facts.history,
        "positions": _positions(facts.positions, measurement.served),
        "prediction_costs": facts.prediction_costs,
        "online": None if facts.online is None else dict(facts.online),
        "summary": _summary(facts, measurement),
        **provenance(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }


def _positions(made_for: int | None, served: Sequence[Served]) -> dict[str, int] | None:
    """Say how long requests were, prompt and answer; beyond its positions no model was trained."""
    if made_for is None:
        return None
    lengths = [len(one.request.prompt) + len(one.tokens) for one in served]
    beyond = sum(length > made_for for length in lengths)
    return {"model": made_for, "longest": max(lengths), "beyond": beyond, "of": len(lengths)}


def _summary(facts: RunFacts, measurement: Measurement) -> dict[str, Any]:
    traffic = {
        f"bytes_{kind}": round(count * facts.expert_bytes / facts.stored_expert_bytes)
        for kind, count in asdict(measurement.traffic).items()
    }
    return {
        **latency_summary(request_table(measurement.served, measurement.accesses), facts.dataset),
        **measurement.accesses.summary(),
        "lossless": measurement.same_as_reference,
        **traffic,
        "peak_slot_bytes": measurement.peak_occupied * facts.expert_bytes,
        "slot_budget_bytes": facts.budget_bytes,
        "dense_bytes": facts.dense_bytes,
        "history_bytes": facts.history_bytes,
        "phase_seconds": asdict(measurement.phases),
        "busy_seconds": measurement.busy_seconds,
        "bound": _bound(facts.bound, measurement.busy_seconds),
    }


def _bound(bound: Roofline | None, busy_seconds: float) -> dict[str, float] | None:
    if bound is None:
        return None
    return {**asdict(bound), "times": bound.times(busy_seconds)}
