"""Figure 14b of the paper (section 6.5): expert hit rate by eviction order."""

from __future__ import annotations

from functools import partial

from experiments.figures.figure14a import draw_approaches

ID = "14b"
TITLE = "Expert hit rate of FineMoE by what its cache evicts first"
APPROACHES = {
    "LRU": {"system": "finemoe", "eviction": "lru"},
    "LFU": {"system": "finemoe", "eviction": "lfu"},
    "FineMoE": {"system": "finemoe", "eviction": "finemoe"},
}
COLOURS = ("#999999", "#0072B2", "#D55E00")
draw = partial(draw_approaches, (ID, TITLE), APPROACHES, COLOURS)
