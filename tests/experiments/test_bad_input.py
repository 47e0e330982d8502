"""Bad input: one line with cause and remedy, exit code 2, nothing that looks complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import setup, testbeds
from experiments.errors import UserError
from experiments.records import existing_record
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import ModelShape
from tests.command import SMALL, composed, run_command


def prepared(*overrides: str) -> setup.Setup:
    cfg = composed(*overrides)
    return setup.prepare(cfg, setup.build(cfg.testbed))


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_command_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    done = run_command(*SMALL, "memory_budget=0.5", f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_budget_below_k_experts_names_the_minimum() -> None:
    assert "at least 0.705 GB (2 experts)" in complaint("memory_budget=0.5")


def test_a_budget_below_one_slot_a_device_names_the_minimum() -> None:
    assert "(3 experts)" in complaint("memory_budget=0.8", "testbed.devices=3")


def test_a_budget_that_is_no_number() -> None:
    assert "neither GB nor a fraction" in complaint("memory_budget=lots")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_local_without_cuda() -> None:
    with pytest.raises(UserError, match="testbed=emulated"):
        testbeds.local(devices=None, chunk_mb=32)


def test_pinning_without_a_core_to_spare() -> None:
    with pytest.raises(UserError, match=r"testbed.pinned=true: .* cores?"):
        testbeds.emulated(1, 32.0, 10.0, 1.0, 32.0, threads=4096, pinned=True)


def test_missing_weights() -> None:
    assert "neither scale, dummy, hub nor a folder" in complaint("weights=/nowhere/model")


def test_a_scale_model_that_is_not_shipped() -> None:
    assert "weights=dummy" in complaint("model.name=other")


def test_weights_that_need_a_network() -> None:
    assert "cannot load mistralai" in complaint("weights=hub")


def test_a_dataset_that_needs_a_network() -> None:
    assert "dataset=docs" in complaint("dataset=lmsys")


def test_a_missing_file() -> None:
    assert "there is no file" in complaint("dataset=lmsys", "dataset.path=/nowhere/a.jsonl")


def test_a_file_in_neither_schema(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "hello"}) + "\n")
    assert "conversations" in complaint("dataset=sharegpt", f"dataset.path={path}")


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("no json {")
    assert "line 1: no JSON" in complaint("dataset=lmsys", f"dataset.path={path}")


def test_a_file_without_a_usable_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversation": [{"role": "assistant", "content": "x"}]}) + "\n")
    assert "no usable prompt" in complaint("dataset=lmsys", f"dataset.path={path}")


def test_prompts_shorter_than_asked_for() -> None:
    message = complaint("workload.input_tokens=100000")
    assert "lower workload.input_tokens" in message


def test_a_split_that_leaves_nothing_to_measure() -> None:
    assert "none to measure" in complaint("workload.history_share=1.0")


def test_a_store_of_another_model(tmp_path: Path) -> None:
    shape = ModelShape(32, 8, 2, 64)
    store = ExpertMapStore(shape, capacity=2, prefetch_distance=3)
    store.save(tmp_path / "maps.safetensors", "another model")
    message = complaint(f"store.load={tmp_path / 'maps.safetensors'}")
    assert "another model" in message


def test_a_system_without_a_store() -> None:
    assert "keeps no store" in complaint("system=on_demand", "store.load=/nowhere")


def test_an_option_with_no_such_value() -> None:
    assert "paper, demo" in complaint("system.variant=best")


@pytest.mark.parametrize(
    "override",
    [
        "workload.prompts=abc",
        "workload.prompts=-1",
        "workload.repeats=1.5",
        "workload.output_tokens=0",
        "workload.history_share=abc",
        "system.prefetch_distance=abc",
        "system.store_capacity=0",
        "system.online_growth=maybe",
        "+system.no_such=1",
        "testbed.threads=0",
        "testbed.devices=1.5",
        "testbed.chunk_mb=1e-7",
        "testbed.time_scale=-1",
        "dataset.kind=songs",
        "seed=-1",
    ],
)
def test_a_value_of_the_wrong_kind_is_named(override: str) -> None:
    key, value = override.removeprefix("+").split("=")
    message = complaint(override)
    assert key.split(".")[-1] in message or value in message


@pytest.mark.parametrize(
    "rows",
    [
        '{"conversation": [{"role": "user"}]}',
        '{"conversations": [{"from": "human", "value": null}]}',
        '{"conversations": ["hello"]}',
        "",
    ],
)
def test_malformed_conversations(rows: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    assert str(path) in complaint("dataset=lmsys", f"dataset.path={path}")


def test_a_budget_beyond_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "free_bytes", lambda device: 1_000_000)
    assert "lower memory_budget" in complaint("memory_budget=100%")


def test_a_warm_up_without_history() -> None:
    assert "workload.warmup=0" in complaint("workload.history_share=0")


def test_a_store_that_cannot_be_saved() -> None:
    assert "choose another file" in complaint("store.save=/proc/nothing/here")


def test_a_record_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    cfg = composed()
    cfg.output = str(tmp_path)
    with pytest.raises(UserError, match="no run record"):
        existing_record(cfg)


def test_an_unwritable_output() -> None:
    with pytest.raises(UserError, match="choose another output"):
        existing_record(composed("output=/proc/nothing/here"))
