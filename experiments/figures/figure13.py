"""Figure 13 of the paper (section 6.4): figure 10 on testbed B, one A100."""

from __future__ import annotations

from functools import partial

from experiments.figures.figure10 import draw_overall

ID = "13"
TITLE = "TTFT, TPOT and expert hit rate of all systems on testbed B"
draw = partial(draw_overall, (ID, TITLE))
