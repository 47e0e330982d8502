"""Imports go one way: experiments -> baselines, finemoe -> finemoe.offload -> finemoe.files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.command import ROOT

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


def test_the_engine_knows_no_system_by_name() -> None:
    for path in (ROOT / "finemoe" / "offload").glob("*.py"):
        text = path.read_text().lower()
        for name in ("moe_infinity", "promoe", "mixtral_offload", "on_demand_policy"):
            assert name not in text
