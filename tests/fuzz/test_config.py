"""Odd values anywhere in a config are refused in one line, or accepted."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.run.config import check
from tests.command import config
from tests.fuzz import fuzzed

CHOICES = {
    "testbed": ("rtx3090x6", "a100", "emulated"),
    "system": ("finemoe", "moe_infinity", "promoe", "mixtral_offload", "deepspeed", "oracle"),
    "model": ("mixtral", "qwen", "phi"),
    "workload": ("offline", "online"),
}
GROUPS = (*CHOICES, "dataset", "store", "logger")
OPTIONS = ("seed", "memory_budget", "weights", "routing", "traces")
ODD = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0, -1, 1e-300, 1e300, 2**31, 2**63, 2**200]),
    st.sampled_from([None, True, "", "abc", "nan", "-1", "../x", "[/b]", [], [1], {}, {"a": 1}]),
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.text(max_size=5).filter(lambda text: "$" not in text),
)


def leaves(node: Any, path: str) -> list[str]:
    """Return the dotted paths of all values of a config."""
    if not isinstance(node, dict):
        return [path]
    return [leaf for key in node for leaf in leaves(node[key], f"{path}.{key}")]


@given(data=st.data())
@fuzzed(20)
def test_odd_values_are_refused_in_one_line(data: st.DataObject) -> None:
    chosen = [f"{key}={data.draw(st.sampled_from(one))}" for key, one in CHOICES.items()]
    cfg = config("config", "output=unused", *chosen)
    for _ in range(data.draw(st.integers(1, 2))):
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        below = [leaf for key in (*GROUPS, *OPTIONS) for leaf in leaves(plain.get(key), key)]
        path = data.draw(st.sampled_from([leaf for leaf in below if "_target_" not in leaf]))
        OmegaConf.update(cfg, path, data.draw(ODD), merge=False)
    line = ""
    try:
        check(cfg)
    except UserError as error:
        line = str(error)
    assert "\n" not in line
