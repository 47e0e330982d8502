"""Figure 14b of the paper (section 6.5): expert hit rate by eviction order."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.figures import style
from experiments.figures.figure14a import draw_approaches

ID = "14b"
TITLE = "Expert hit rate of FineMoE by what its cache evicts first"
APPROACHES = {
    "LRU": {"system": "finemoe", "eviction": "lru"},
    "LFU": {"system": "finemoe", "eviction": "lfu"},
    "FineMoE": {"system": "finemoe", "eviction": "finemoe"},
}
COLOURS = ("#999999", "#0072B2", "#D55E00")


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    return draw_approaches(frame, place, mixed_modes, (ID, TITLE), APPROACHES, COLOURS)
