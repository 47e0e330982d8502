"""Bad input: one line with cause and remedy, exit code 2, nothing that looks complete."""

from pathlib import Path

import pytest
import torch

from experiments.errors import UserError
from experiments.run import live, testbeds
from experiments.run.config import build, check
from experiments.run.records import provenance
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import ModelShape
from tests.command import composed, config, unlike


def complaint(*overrides: str) -> str:
    cfg = composed(*overrides)
    with pytest.raises(UserError) as caught:
        live.load_setup(cfg, build(cfg.testbed))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_driver_too_old_for_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="driver is too old for torch's CUDA"):
        testbeds.local(devices=None, chunk_mb=32)
    assert build(config("config", "testbed=auto").testbed).mode == "simulated"
    assert provenance()["machine"]["gpus"] == []


def test_pinning_without_a_core_to_spare() -> None:
    with pytest.raises(UserError, match=r"testbed.pinned=true: .* cores?"):
        testbeds.emulated(1, 32.0, 10.0, 1.0, 32.0, threads=4096, pinned=True)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("model.name=other", "weights=dummy"),
        ("weights=hub", "Mixtral-8x7B-Instruct-v0.1: it is not in the cache"),
        ("dataset=lmsys", "dataset=docs"),
        ("workload.input_tokens=100000", "lower workload.input_tokens"),
    ],
)
def test_what_cannot_be_loaded(override: str, remedy: str) -> None:
    assert remedy in complaint(override)


def test_a_store_of_another_model(tmp_path: Path) -> None:
    store = ExpertMapStore(ModelShape(32, 8, 2, 64), capacity=2, prefetch_distance=3)
    store.save(tmp_path / "maps.safetensors", "another model")
    assert "another model" in complaint(f"store.load={tmp_path / 'maps.safetensors'}")


MISTAKES = {
    "seed=18446744073709551616": "seed=18446744073709551616",
    "memory_budget=lots": "write 6, 6GB or 25%",
    "memory_budget=nan": "finite number",
    "memory_budget=0.5": "at least 0.705 GB (2 experts)",
    "memory_budget=100% testbed=rtx4090": "lower memory_budget",
    "weights=/nowhere/model": "neither scale, dummy, hub nor a folder",
    "store.load=/nowhere/maps.safetensors": "/nowhere/maps.safetensors",
    "store.load=/nowhere system=on_demand": "keeps no store",
    "system.variant=best": "'paper' or 'demo'",
    "+system.no_such=1": "system.no_such=1",
    "~system": "system: field required",
    "system._target_=baselines.none.Policy": "baselines.none",
    "system=promoe system.predictor=learned system.predictor_path=/nowhere": "train it",
    "system=deepspeed_zero workload=online": "use workload=offline",
    "workload=online store.save=maps.safetensors": "use workload=offline",
    "system=deepspeed_zero testbed=a100": "real model",
    "model.top_k=9": "only 8 experts",
    "model.name=a/b": "model.name=a/b",
    "workload.history_share=0.9": "none to measure",
    "workload.history_share=0": "set workload.warmup=0",
    "workload=online workload.rate=nan": "workload.rate=nan",
    "workload=online workload.trace=/nowhere.csv": "/nowhere.csv",
    "dataset=sharegpt dataset.path=/nowhere/a.jsonl": "there is no file",
    "model=checkpoint weights=scale": "reads weights=<folder or hub id>, and they are scale",
    "model=checkpoint weights=dummy": "or give dummy weights the model.hub_id= to be like",
    "model=checkpoint weights=someone/nothing": "cannot load the config of someone/nothing",
    "testbed=a100 system.prediction_us.mixtral.gate=-5": "prediction_us.mixtral.gate=-5",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_loaded(overrides: str) -> None:
    groups = {"online": "workload.", "testbed=": "testbed"}
    small = unlike(*(group for word, group in groups.items() if word in overrides))
    cfg = config("config", *small, "output=unused", *overrides.split())
    with pytest.raises(UserError) as caught:
        check(cfg)
    message = str(caught.value)
    assert MISTAKES[overrides] in message
    assert "\n" not in message
