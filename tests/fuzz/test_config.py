"""Odd values anywhere in a config are refused in one line, or serve a run that ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.run.config import check
from experiments.run.console import Console
from experiments.run.protocol import run
from tests.command import config
from tests.fuzz import fuzzed

TESTBEDS = ("rtx3090x6", "a100", "emulated")
SYSTEMS = ("finemoe", "moe_infinity", "promoe", "mixtral_offload", "deepspeed", "oracle")
WORKLOADS = ("offline", "online")
GROUPS = ("testbed", "model", "system", "workload", "dataset", "store", "logger")

LENGTHS = (
    "workload.prompts=4",
    "workload.history_share=0.5",
    "workload.output_tokens=4",
    "workload.input_tokens=12",
)

ODD = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0, -1, 1e-300, 1e300, 2**31, 2**63, 2**200]),
    st.sampled_from([None, True, "", "abc", "nan", "-1", "../x", "[/b]", [], [1], {}, {"a": 1}]),
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.text(max_size=5).filter(lambda text: "$" not in text),
)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the one routing trace that all small simulated runs share."""
    return tmp_path_factory.mktemp("traces")


def leaves(node: Any, path: str = "") -> list[str]:
    """Return the dotted paths of all values of a config."""
    if not isinstance(node, dict):
        return [path]
    return [leaf for key in node for leaf in leaves(node[key], f"{path}.{key}" if path else key)]


@given(data=st.data())
@fuzzed(60)
def test_odd_values_are_refused_in_one_line(data: st.DataObject) -> None:
    cfg = drawn(data)
    for _ in range(data.draw(st.integers(1, 2))):
        spoil(data, cfg, (*GROUPS, "seed", "memory_budget", "weights", "routing", "traces"))
    complain(cfg)


@given(data=st.data())
@fuzzed(10)
def test_what_is_accepted_of_a_testbed_or_system_serves(
    data: st.DataObject, traces: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    testbed, system = data.draw(st.sampled_from(TESTBEDS[:2])), data.draw(st.sampled_from(SYSTEMS))
    cfg = quick(f"testbed={testbed}", f"system={system}", f"traces={traces}", *LENGTHS)
    cfg.output = str(tmp_path_factory.mktemp("run"))
    spoil(data, cfg, ("testbed", "system"))
    if complain(cfg):
        return
    record = run(cfg, Console(quiet=True))
    assert all(math.isfinite(record["summary"][key]["mean"]) for key in ("ttft_s", "tpot_s"))


def drawn(data: st.DataObject) -> DictConfig:
    workload = data.draw(st.sampled_from(WORKLOADS))
    testbed, system = data.draw(st.sampled_from(TESTBEDS)), data.draw(st.sampled_from(SYSTEMS))
    model = data.draw(st.sampled_from(("mixtral", "qwen", "phi")))
    return quick(f"testbed={testbed}", f"system={system}", f"model={model}", f"workload={workload}")


def quick(*overrides: str) -> DictConfig:
    return config("config", "output=unused", *overrides)


def spoil(data: st.DataObject, cfg: DictConfig, where: tuple[str, ...]) -> None:
    """Put an odd value somewhere below the groups or options named."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    below = [leaf for key in where for leaf in leaves(plain.get(key), key)]
    path = data.draw(st.sampled_from([leaf for leaf in below if "_target_" not in leaf]))
    OmegaConf.update(cfg, path, data.draw(ODD), merge=False)


def complain(cfg: DictConfig) -> str:
    """Check a config; return the one line that refuses it, or nothing."""
    line = ""
    try:
        check(cfg)
    except UserError as error:
        line = str(error) or "\n"
    assert "\n" not in line
    return line
