"""Imports go one way."""

import ast
from pathlib import Path

import pytest

from tests.command import ROOT

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
    "experiments/bench": (*RUN, "experiments.validate", "experiments.bench"),
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
