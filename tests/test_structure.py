"""Imports go one way: experiments -> baselines, finemoe -> finemoe.offload -> finemoe.files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.command import ROOT

CONF = ROOT / "conf"

ALLOWED = {
    "finemoe/offload": ("finemoe.offload", "finemoe.files"),
    "finemoe": ("finemoe",),
    "baselines": ("baselines", "finemoe"),
    "experiments": ("experiments", "baselines", "finemoe"),
    "experiments/figures": ("experiments", "baselines", "finemoe"),
}
OURS = ("finemoe", "baselines", "experiments", "run", "tests")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.split(".")[0] in OURS}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for name in imported(path):
            assert name.startswith(ALLOWED[folder]), f"{path} imports {name}"


SYSTEMS = [(path.stem, OmegaConf.load(path)._target_) for path in CONF.glob("system/*.yaml")]
WORDS_OF_THE_ENGINE = {"finemoe", "on_demand"}


def words(path: Path) -> set[str]:
    """Return the names that a module uses, and its texts."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


@pytest.mark.parametrize(("system", "target"), SYSTEMS)
def test_the_engine_knows_no_system_by_name(system: str, target: str) -> None:
    named = {system, target.rpartition(".")[2]} - WORDS_OF_THE_ENGINE
    for path in (ROOT / "finemoe" / "offload").glob("*.py"):
        assert not named & words(path), f"{path} knows {system}"
