"""What tests of pictures share."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in the order in which they are written to files, to be looked into."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        if figure not in figures:
            figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures
