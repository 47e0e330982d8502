"""Figure 13 of the paper (section 6.4): figure 10 on testbed B, one A100."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.figures import style
from experiments.figures.figure10 import draw_overall

ID = "13"
TITLE = "TTFT, TPOT and expert hit rate of all systems on testbed B"


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    return draw_overall(frame, place, mixed_modes, ID, TITLE)
