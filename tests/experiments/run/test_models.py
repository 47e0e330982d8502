"""Checkpoints that are another model, damaged, or not there; what tells weights apart."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer

from experiments.errors import UserError
from experiments.run import models, weights
from experiments.run.datasets import template
from experiments.run.models import check_weights, load_model
from experiments.run.weights import SCALE_MODELS, fingerprint
from tests.command import composed, refusal, run_command, unlike
from tests.engine import into_cache, page_locks, saved_mixtral

FACTS = {"layers": 2, "experts": 4, "hidden_size": 16, "expert_intermediate_size": 16}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 2 layers and 4 experts, top-2, in three shards, with its tokenizer."""
    return saved_mixtral(tmp_path_factory.mktemp("whole") / "model", 2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def config_of(weights: Path | str, **facts: Any) -> Any:
    told = [f"model.{name}={value}" for name, value in {**FACTS, **facts}.items()]
    return composed(f"weights='{weights}'", "model.hub_id=someone/toy", *told)


def loaded(weights: Path | str, **facts: Any) -> Any:
    cfg = config_of(weights, **facts)
    return load_model(cfg.model, str(weights), CPU, 0)


def shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def enlarge_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<one more>")])
    tokenizer.save_pretrained(folder)


CUSTOM = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "model-00001-of-.*not fully": lambda it: shard(it).write_bytes(shard(it).read_bytes()[:-100]),
    "model-00001-of-.*header too small": lambda it: shard(it).write_bytes(b""),
    "No such file.*model-00001": lambda it: shard(it).unlink(),
    "no file named model.safetensors": lambda it: remove(it, "model*"),
    "cannot load the tokenizer of": lambda it: remove(it, "tokenizer*"),
    "cannot load the tokenizer": lambda it: (it / "tokenizer.json").write_text("{}"),
    "4097 ids, the model's vocabulary 4096": enlarge_tokenizer,
    "not a valid JSON file": lambda it: (it / "config.json").write_text("{"),
}
ODD_CONFIGS: dict[str, dict[str, Any]] = {
    "requires optimum.*; install": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "requires gptqmodel.*; install": {"quantization_config": {"quant_method": "awq"}},
    "transformers knows no odd, by which": {"quantization_config": {"quant_method": "odd"}},
    "9 tensors are missing, such as model.layers.2": {"num_hidden_layers": 3},
    "tensors are mismatched": {"hidden_size": 32},
    "'hidden_size' expected int": {"hidden_size": "x"},
    "LlamaForCausalLM has no experts": {"model_type": "llama"},
    "contains custom code": {"model_type": "evil", "auto_map": CUSTOM},
}


def refused(folder: Path, cause: str, **facts: Any) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        loaded(folder, **facts)
    assert "\n" not in str(caught.value)
    assert "reached" not in str(caught.value), "it is not the network"


@pytest.mark.parametrize("cause", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_cause(cause: str, folder: Path) -> None:
    DAMAGES[cause](folder)
    refused(folder, cause)


@pytest.mark.parametrize("cause", ODD_CONFIGS)
def test_an_odd_config_runs_no_code(cause: str, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    changes = ODD_CONFIGS[cause]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    # The model's YAML says the same, as far as it says it.
    names = {"num_hidden_layers": "layers", "hidden_size": "hidden_size"}
    refused(folder, cause, **{names[key]: value for key, value in changes.items() if key in names})
    assert not ran.exists()


@pytest.mark.parametrize("testbed", ["emulated", "rtx3090x6"])
def test_weights_of_another_model_are_refused(testbed: str, tmp_path: Path) -> None:
    places = (f"output={tmp_path / 'run'}", f"traces={tmp_path / 'traces'}")
    scale = f"weights={SCALE_MODELS / 'mixtral'}"
    done = run_command(*unlike("testbed"), "model=qwen", scale, f"testbed={testbed}", *places)
    assert "hold a mixtral of 32 x 8 experts" in refusal(done)
    assert "; use model=mixtral weights=scale" in done.stderr
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("model", ["mixtral", "qwen", "phi"])
def test_the_config_alone_tells_which_model_fits(model: str, tmp_path: Path) -> None:
    fitting = composed(f"model={model}", f"weights={tmp_path}")
    family = fitting.model.scale.config.model_type
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    check_weights(fitting)
    other = "phi" if model == "mixtral" else "mixtral"
    with pytest.raises(UserError, match=f"hold a {family} .*; use model={model}$"):
        check_weights(composed(f"model={other}", f"weights={tmp_path}"))


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache of a hub that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_without_a_network_the_cache_is_used(whole: Path, unreachable: Path, capfd: Any) -> None:
    into_cache(unreachable, "someone--toy", whole)
    assert loaded("hub").offloaded.shape.layers == 2
    assert capfd.readouterr().err.count("what the cache holds is used") == 1
    with pytest.raises(UserError, match=r"2 x 4 experts.*2 x 5 experts"):
        check_weights(config_of("hub", experts=5))


def test_without_network_or_cache_one_line_says_so(unreachable: Path, capfd: Any) -> None:
    check_weights(config_of("hub"))
    with pytest.raises(UserError, match=r"not in the cache, and http.* cannot be reached; connect"):
        loaded("hub")
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{% if %}",
    ],
)
def test_a_chat_template_that_changes_prompts_is_refused(chat_template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SCALE_MODELS / "mixtral")
    tokenizer.chat_template = "<{{ messages[0].content | trim }}>"
    assert [len(part) for part in template(tokenizer)] == [1, 1]
    tokenizer.chat_template = chat_template
    with pytest.raises(UserError, match=r"chat template.*; remove or replace its chat template"):
        template(tokenizer)


def test_memory_that_cannot_be_page_locked(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = page_locks(monkeypatch, limit=5)
    cfg = config_of(whole)
    with pytest.raises(UserError, match=r"page-lock.*ulimit -l unlimited") as caught:
        load_model(cfg.model, str(whole), torch.device("cuda"), 0)
    assert "\n" not in str(caught.value)
    assert not locked


def memory(folder: Path, available_kb: int, **files: str) -> Path:
    """Write what a machine says of its memory, with the limits of a control group."""
    (folder / "self").mkdir()
    (folder / "meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable: {available_kb} kB\n")
    (folder / "self" / "cgroup").write_text("4:memory:/job/step\n0::/job/step\n")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V2 = {"memory.max": "3000000", "memory.current": "2500000"}
V1 = {"memory/job/memory.limit_in_bytes": "3000000", "memory/job/memory.usage_in_bytes": "2500000"}
STAT = "anon 5\nactive_file 200000\ninactive_file 100000\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        ({"job/memory.stat": STAT} | {f"job/{name}": text for name, text in V2.items()}, 800_000),
        ({"memory.stat": STAT, **V2, "memory.max": "max"}, 1_024_000),
        ({"memory/job/memory.stat": STAT, **V1}, 800_000),
    ],
    ids=["machine", "group", "no limit", "group of version 1"],
)
def test_available_memory(files: Any, expected: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "PROC", memory(tmp_path, 1000, **files))
    monkeypatch.setattr(models, "CGROUPS", tmp_path)
    assert models.available_bytes() == expected


def test_a_model_beyond_host_memory(folder: Path, tmp_path_factory: Any, monkeypatch: Any) -> None:
    remove(folder, "model*")
    monkeypatch.setattr(models, "PROC", memory(tmp_path_factory.mktemp("proc"), 200))
    refused(folder, r"loading weights=.* takes 0.0 GB .*\(0.0 GB for experts stay\), and 0.0 GB")


TOY = {"name": "toy", "hub_id": "someone/toy"}


def of(folder: Path) -> str:
    return fingerprint(TOY, str(folder), 0)


def test_every_file_of_the_model_counts_and_nothing_else(folder: Path) -> None:
    (folder / "predictor.safetensors").write_bytes(b"one")
    before = of(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes())
    (folder / "predictor.safetensors").write_bytes(b"another")
    assert fingerprint(TOY, str(folder), 1) == of(folder) == before
    folder = folder.rename(folder.with_name("moved"))
    assert of(folder) == before
    for path in (folder / "config.json", *folder.glob("model-*.safetensors")):
        before = of(folder)
        path.write_bytes(b"!")
        changed = of(folder)
        path.unlink()
        assert len({before, changed, of(folder)}) == 3


def test_a_large_file_is_told_by_its_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = of(folder)
    monkeypatch.setattr(weights, "LARGE", 0)
    weights._digest.cache_clear()
    large = of(folder)
    (folder / "config.json").touch()
    assert len({small, large, of(folder)}) == 3


def test_dummies_and_hub_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--someone--toy" / "refs" / "main"
    marks = {fingerprint(TOY, "dummy", seed) for seed in (0, 1, 1)}
    marks |= {fingerprint({**TOY, "hub_id": one}, "hub", 0) for one in ("someone/toy", "other/x")}
    reference.parent.mkdir(parents=True)
    for revision in ("abc", "def"):
        reference.write_text(revision)
        marks.add(fingerprint(TOY, "hub", 0))
    assert len(marks) == 6
