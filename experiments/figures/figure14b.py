"""Figure 14b of the paper (section 6.5): expert hit rate by eviction order."""

from functools import partial

from experiments.figures.figure14a import draw_approaches

TITLE = "Expert hit rate of FineMoE by what its cache evicts first"
APPROACHES = {
    "LRU": ("#999999", {"system": "finemoe", "eviction": "lru"}),
    "LFU": ("#0072B2", {"system": "finemoe", "eviction": "lfu"}),
    "FineMoE": ("#D55E00", {"system": "finemoe", "eviction": "finemoe"}),
}
draw = partial(draw_approaches, ("14b", TITLE), APPROACHES)
