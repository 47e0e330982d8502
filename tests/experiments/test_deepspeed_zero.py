"""The real DeepSpeed under ZeRO stage 3 on the CPU: same logits, offloaded, gone afterwards."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from baselines.deepspeed_zero import ALONE, ZeroOptions, under_zero, watching
from experiments.errors import UserError
from experiments.run.console import Console
from experiments.run.live import PlainRuntime
from experiments.run.models import small_model
from experiments.run.protocol import run
from experiments.run.schedule import Request
from finemoe.offload.model import find_moe_layers
from tests import engine
from tests.command import SMALL, carried_out, composed

CPU = torch.device("cpu")
EVERYTHING = ZeroOptions(param_persistence_threshold=0)
NOTHING_AHEAD = ZeroOptions(param_persistence_threshold=0, prefetch_bucket_size=0)
LAYER_BYTES = 2 * (4 * 2 * 48 * 32 + 4 * 32 * 48)
"""Experts of one layer of the small Mixtral: gate and up, then down, in bfloat16."""
REQUESTS = [Request(n, tuple(range(n, n + 12)), 5) for n in range(3)]


def logits_of(model: Any) -> list[Tensor]:
    return engine.logits_of(PlainRuntime(model), REQUESTS)


def experts_of(model: Any) -> list[Any]:
    return [p for module in find_moe_layers(model)[1] for p in module.parameters(recurse=False)]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_logits_are_those_of_the_unoffloaded_model(family: str) -> None:
    model = small_model(family)
    expected = logits_of(model)
    with under_zero(model, CPU, EVERYTHING) as zero:
        served = logits_of(zero)
    assert all(torch.equal(a, b) for a, b in zip(served, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "layers"), [(NOTHING_AHEAD, 1), (EVERYTHING, 3)], ids=["no_prefetch", "prefetch"]
)
def test_experts_are_gathered_by_layers_and_dropped(options: ZeroOptions, layers: int) -> None:
    model = small_model("mixtral")
    experts = experts_of(model)
    with under_zero(model, CPU, options) as zero:
        logits_of(zero)
        with watching(model, experts) as gathered:
            logits_of(zero)
        assert gathered["experts"] == layers * LAYER_BYTES
        assert gathered["total"] > gathered["experts"]
        assert all(p.ds_status.name == "NOT_AVAILABLE" for p in experts)
        assert all(p.ds_tensor.device == CPU for p in experts)


def test_nothing_lingers() -> None:
    before = {name: os.environ.get(name) for name in ALONE}
    model = small_model("mixtral")
    with under_zero(model, CPU, ZeroOptions()) as zero:
        assert torch.distributed.get_backend() == "gloo"
        assert "pinned_max_cached_size_mb:1" in torch._C._accelerator_getAllocatorSettings()
        logits_of(zero)
    assert not torch.distributed.is_initialized()
    assert {name: os.environ.get(name) for name in ALONE} == before
    assert sum(p.nbytes + p.ds_tensor.nbytes for p in list[Any](model.parameters())) == 0


@pytest.mark.parametrize("bad", ["weights=dummy", "store.save=maps", "system.experts=triton"])
def test_what_it_cannot_serve_is_refused_in_one_line(bad: str) -> None:
    with pytest.raises(UserError) as caught:
        run(composed("system=deepspeed_zero", bad), Console())
    assert "\n" not in str(caught.value)


def test_same_table_same_tokens(tmp_path: Path) -> None:
    places = [f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${system.label}"]
    choices = ["system=on_demand,deepspeed_zero", "testbed.devices=3", "workload.batch_size=2"]
    carried_out("-m", *choices, *SMALL, *places)
    systems = ("on_demand", "deepspeed_zero")
    tables = [pd.read_parquet(tmp_path / system / "requests.parquet") for system in systems]
    tokens = [[list(row) for row in table["tokens"]] for table in tables]
    assert len(tokens[0]) == 2
    assert tokens[0] == tokens[1]
    assert tables[1]["hits"].isna().all()
    record = json.loads((tmp_path / "deepspeed_zero" / "run.json").read_text())
    summary = record["summary"]
    assert summary["lossless"] is True
    assert summary["ttft_s"]["mean"] > 0
    assert record["memory_budget_gb"] is summary["expert_hit_rate"] is summary["hits"] is None
    # One layer of the full-size model, 8 experts, and not the 32 layers it has.
    assert summary["peak_gathered_expert_bytes"] == 8 * 352_321_536
    assert summary["host_expert_bytes"] == 32 * 8 * 352_321_536


def test_a_model_smaller_than_the_threshold_persists_unless_sizes_shrink_with_it() -> None:
    peaks = []
    for shrinkage in ((), (30_000.0, 128.0)):
        model = small_model("mixtral")
        with under_zero(model, CPU, ZeroOptions(), *shrinkage) as zero:
            logits_of(zero)
            with watching(model, experts_of(model)) as gathered:
                logits_of(zero)
        peaks.append(gathered["experts"])
    assert peaks[0] == 3 * LAYER_BYTES
    assert peaks[1] < peaks[0]
