"""Imports go one way, and the engine knows no system by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.command import ROOT

CONF = ROOT / "conf"

BELOW = ("experiments.errors", "experiments.bootstrap", "experiments.style", "baselines", "finemoe")
RUN = (*BELOW, "experiments.run")
JUDGE = (*RUN, "experiments.judge")
FIGURES = (*JUDGE, "experiments.figures")
ALLOWED = {
    "finemoe/offload": ("finemoe.offload", "finemoe.files"),
    "finemoe": ("finemoe",),
    "baselines": ("baselines", "finemoe"),
    "experiments": BELOW,
    "experiments/run": RUN,
    "experiments/judge": JUDGE,
    "experiments/figures": FIGURES,
    "experiments/reproduce": (*FIGURES, "experiments.reproduce"),
    "experiments/bench": (*RUN, "experiments.bench"),
    "experiments/validate": (*RUN, "experiments.validate"),
    "experiments/train": (*RUN, "experiments.train"),
}
CONSTANTS = {"experiments"}
"""Where the project's folders are named."""
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
            known = name in CONSTANTS or name.startswith(ALLOWED[folder])
            assert known, f"{path} imports {name}"


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
