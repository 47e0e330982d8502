"""A checkpoint is all that a run needs: its facts, costs and record, live and simulated."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.errors import UserError
from experiments.reproduce.sweeps import available, run_configs
from experiments.run.config import check, full_size
from experiments.run.console import Console
from experiments.run.models import LoadedModel, facts_of, load_model
from experiments.run.protocol import run
from experiments.run.weights import SCALE_MODELS, model_of
from finemoe.costs import RooflineCosts
from finemoe.offload.device import Dispatch
from tests.architectures import saved
from tests.command import ROOT, SMALL, carried_out, composed, config, record_of, unlike
from tests.engine import into_cache
from tests.finemoe.test_costs import RTX_3090

PUBLISHED: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
FAMILIES = (
    *("qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "jamba", "granitemoehybrid"),
    "qwen3_vl_moe",
)
SHAPES = {"gpt_oss": (3, 8, 2), "jamba": (2, 8, 2), "qwen3_moe": (3, 8, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: saved(family, root / f"My {family}") for family in FAMILIES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_are_those_of_the_published_model(name: str) -> None:
    facts = dict(PUBLISHED[name])
    billions, kind = facts.pop("billions"), facts.pop("model_type")
    with torch.device("meta"):
        own = AutoConfig.for_model(kind, **facts)
        model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)
    found = facts_of(model, f"someone/{name}")
    assert (found["name"], found["model_type"]) == (name.lower(), own.model_type)
    asked = facts.get("num_experts_per_tok") or facts.get("moe_k") or facts["moe_topk"][0]
    assert found["top_k"] == asked
    sizes = full_size(OmegaConf.create(found))
    experts = sizes.layers * sizes.experts * sizes.expert_bytes
    total = sum(one.numel() for one in model.parameters())
    assert total == pytest.approx(billions * 1e9, rel=0.01)
    assert (experts + sizes.dense_bytes) / 2 == pytest.approx(total, rel=0.01)
    costs = RooflineCosts(RTX_3090, sizes)
    fast = 936e9 * 0.85
    # A decode step reads all that is dense, but for the embedding, once.
    spent = costs.iteration([1], [1])
    seconds = spent.finish + sizes.layers * spent.dense - 10e-6 * (sizes.layers + 1)
    kernels = 5e-6 * (9 + sizes.layers * sizes.layer_kernels)
    counted = found["counted"]
    unread = 0 if counted["tied"] else counted["embedding_bytes"]
    assert (seconds - kernels) * fast == pytest.approx(sizes.dense_bytes - unread, rel=0.01)


GOLDEN = {
    "mixtral": (3210739712, 352321536, 0.00034433992961287077, 0.0018958531830985917),
    "phi": (3213885440, 157286400, 0.00034442230266465564, 0.0008657380281690141),
    "qwen": (3716808704, 17301504, 0.0003721099446958271, 0.00012638118309859153),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_models_of_the_paper_cost_never_changes(name: str) -> None:
    option: Any = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    sizes = full_size(option)
    costs = RooflineCosts(RTX_3090, sizes)
    dense = costs.iteration([1, 1, 1], [9, 700, 33]).dense
    assert (sizes.dense_bytes, sizes.expert_bytes, dense, costs.expert(300)) == GOLDEN[name]


def test_linear_attention_reads_no_keys_and_values(folders: dict[str, Path]) -> None:
    cfg = composed("model=checkpoint", f"weights='{folders['granitemoehybrid']}'")
    check(cfg)
    costs = RooflineCosts(RTX_3090, full_size(cfg.model))
    short, long = (3 * costs.iteration([1], [length]).dense for length in (10**6, 2 * 10**6))
    # One of three layers keeps 2 heads x (8 + 8) numbers of 2 bytes.
    assert long - short == pytest.approx(10**6 * 64 / (936e9 * 0.85))


@pytest.mark.parametrize("testbed", ["emulated", "a100"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_folder(family: str, testbed: str, folders: dict[str, Path], tmp_path: Path) -> None:
    small = SMALL if testbed == "emulated" else unlike("testbed")
    for system in ("finemoe", "promoe"):  # one reads what gates say, the other what they read
        chosen = (f"system={system}", f"testbed={testbed}", f"weights='{folders[family]}'")
        places = (f"output={tmp_path / system}", f"traces={tmp_path}", "memory_budget=30%")
        cfg = config("config", *small, *chosen, *places, "model=checkpoint")
        run(cfg, Console(quiet=True))
        record = record_of(tmp_path / system)
        own = record["config"]["model"]
        kind = "qwen3_vl_moe_text" if family == "qwen3_vl_moe" else family
        assert record["model"] == f"my-{family}"
        assert own["facts"].startswith(f"my-{family} is a {kind} in bfloat16")
        assert record["summary"]["lossless"] is (True if testbed == "emulated" else None)
        assert record["summary"]["dense_bytes"] == own["counted"]["dense_bytes"]
        assert record["expert_bytes"] == own["counted"]["expert_bytes"]
        routed = (own["layers"], own["experts"], own["top_k"])
        assert routed == SHAPES.get(family, routed)


def test_run_py_takes_the_model_from_the_weights(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folders["qwen3_moe"].parent))
    words = (*SMALL, "weights='~/My qwen3_moe'", "model.prefetch_distance=2", f"output={tmp_path}")
    assert "my-qwen3_moe is a qwen3_moe in" in carried_out(*words)
    record = record_of(tmp_path)
    assert record["config"]["model"]["prefetch_distance"] == 2
    assert record["config"]["system"]["prefetch_distance"] == 2


def test_an_experiment_takes_the_model_from_the_weights(folders: dict[str, Path]) -> None:
    words = [f"weights='{folders['qwen3_moe']}'", "dataset=docs", "system=finemoe"]
    (cfg,) = run_configs(available()["10"], [*words, *model_of(words)]).values()
    assert (cfg.model.name, cfg.system.prefetch_distance) == ("my-qwen3_moe", 3)


def test_a_hub_id_is_enough(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    into_cache(tmp_path, "someone--Large.MoE", folders["jamba"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cfg = composed("model=checkpoint", "weights=someone/Large.MoE", f"output={tmp_path / 'run'}")
    record = run(cfg, Console(quiet=True))
    own = record["config"]["model"]
    assert (own["name"], own["hub_id"], own["layers"]) == ("large.moe", "someone/Large.MoE", 2)
    assert record["summary"]["lossless"]


def test_facts_that_disagree_are_refused(folders: dict[str, Path]) -> None:
    told = ("model=checkpoint", f"weights='{folders['qwen3_moe']}'", "model.experts=9")
    with pytest.raises(UserError, match=r"hold a qwen3_moe of 3 x 8 .* is a None of None x 9"):
        check(composed(*told))


def test_dummies_are_like_the_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    like = f"model.hub_id='{folders['jamba']}'"
    cfg = composed("model=checkpoint", "weights=dummy", like, f"output={tmp_path}")
    run(cfg, Console(quiet=True))
    record = record_of(tmp_path)
    assert (record["model"], record["summary"]["lossless"]) == ("my-jamba", True)
    assert record["as_eager_experts"]
    assert SCALE_MODELS.name not in record["config"]["model"]["facts"]


def test_other_sums_are_said(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    # As if experts were added in the other order.
    combine = Dispatch.combine
    monkeypatch.setattr(Dispatch, "combine", lambda self, outputs: combine(self, outputs) * 1.01)
    cfg = composed("model=checkpoint", f"weights='{folders['qwen3_moe']}'", f"output={tmp_path}")
    record = run(cfg, Console(quiet=True))
    assert (record["as_eager_experts"], record["summary"]["lossless"]) == (False, True)


def loaded(folder: Path, *told: str) -> LoadedModel:
    cfg = composed("model=checkpoint", f"weights='{folder}'", *told)
    check(cfg)
    return load_model(cfg.model, str(folder), torch.device("cpu"), 0)


def test_a_cast_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["qwen3_moe"]
    assert loaded(folder).cast is None
    cfg = composed("model=checkpoint", f"weights='{folder}'", "model.dtype=float32")
    cfg.output = str(tmp_path)
    record = run(cfg, Console(quiet=True))
    assert record["cast"] == "BF16 cast to float32"
    assert record["config"]["model"]["facts"].startswith("my-qwen3_moe is a qwen3_moe in float32")


def test_quantised_weights_are_cast(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen3_moe"], tmp_path / "fp8"))
    tensors = load_file(folder / "model.safetensors")
    routed = [name for name in tensors if ".experts." in name]
    for name in routed:
        tensors[name] = tensors[name].mul(4).to(torch.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale_inv")] = torch.full((2, 2), 0.25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    model = loaded(folder)
    said = r"fp8 dequantised to bfloat16, 1\.\d x the bytes on host and link"
    assert re.fullmatch(said, str(model.cast))
    store = model.offloaded.store
    down = tensors["model.layers.0.mlp.experts.3.down_proj.weight"].float().mul(0.25).bfloat16()
    assert torch.equal(store.layout.views(store.blocks[3])["down_proj"], down)


def test_a_folder_without_a_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen3_moe"], tmp_path / "mute"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*: it makes no tokens"):
        loaded(folder)
