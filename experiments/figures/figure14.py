"""Figure 14 of the paper (section 6.5): hit rate by how FineMoE prefetches, and what it evicts."""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import style
from experiments.figures import charts

SPECULATE, HIT_COUNT = "#56B4E9", "#009E73"
IN_SEARCHER, MAP = {"system": "in_searcher"}, {"system": "finemoe", "eviction": "lru"}
Approaches = dict[str, tuple[str, dict[str, str]]]  # colour, and system and options
# Maps grow darker with each feature; whole systems have the colours of their predictions.
TRACKING: Approaches = {
    "Speculate": (SPECULATE, {**IN_SEARCHER, "predictor": "speculation"}),
    "Hit count": (HIT_COUNT, {**IN_SEARCHER, "predictor": "hit_count"}),
    "Map (T)": ("#F9C9A3", {**MAP, "search": "trajectory", "selection": "top_k"}),
    "Map (T+S)": ("#EE8A45", {**MAP, "search": "both", "selection": "top_k"}),
    "Map (T+S+δ)": ("#B34700", {**MAP, "search": "both", "selection": "delta"}),
    "ProMoE": (SPECULATE, {"system": "promoe", "predictor": "gate"}),
    "MoE-Infinity": (HIT_COUNT, {"system": "moe_infinity"}),
}
CACHING: Approaches = {
    "LRU": ("#999999", {"system": "finemoe", "eviction": "lru"}),
    "LFU": ("#0072B2", {"system": "finemoe", "eviction": "lfu"}),
    "FineMoE": ("#D55E00", {"system": "finemoe", "eviction": "finemoe"}),
}
WHOLE = ("ProMoE", "MoE-Infinity")  # systems, not approaches of the paper
HOLLOW = (
    "Filled bars: all in FineMoE's searcher, with LRU caching; only predictions differ. Hollow: "
    "whole systems, in the colours of their predictions."
)


def _draw(
    name: str,
    title: str,
    approaches: Approaches,
    frame: pd.DataFrame,
    output: Path,
    mixed_modes: bool = False,
) -> None:
    """Draw hit rates of `approaches`, a panel a dataset, models as groups; WHOLE is hollow."""
    of_runs = [_approach(run, approaches) for run in frame.to_dict("records")]
    frame = frame.assign(approach=pd.Series(of_runs, index=frame.index, dtype=object))
    frame = charts.checked(frame.dropna(subset=["approach"]), name, mixed_modes)
    frame["series"] = charts.named_after(frame["approach"], frame)
    charts.single(frame, name)
    models, datasets = charts.facets(frame)
    base = {name: (colour, "") for name, (colour, _) in approaches.items()}
    looks = charts.variants(frame, "approach", base)
    hollow = set(frame.loc[frame["approach"].isin(WHOLE), "series"])
    groups = {model: style.model_name(model) for model in models}
    with charts.panels(datasets, ["hit_rate"], 0.65 + 1.35 * len(datasets)) as (figure, panels):
        for axes, dataset, metric in panels:
            part = frame[frame["dataset"] == dataset]
            charts.bars(axes, part, metric, "model", groups, looks, hollow)
            axes.set_ylabel(style.METRICS[metric][0])
            if len(datasets) > 1:
                axes.set_title(style.dataset_name(dataset))
        charts.legend(figure, looks, "bar", 3, hollow=hollow)
        bars = f"Error bars: {charts.INTERVALS}, batches resampled."
        doc = f"{title}\n\n{HOLLOW if hollow else ''} {bars}"
        charts.save(figure, output, name, doc, frame, ["hit_rate"], "approach")


def _approach(run: Any, approaches: Approaches) -> str | None:
    """Return the approach of a run; a run with any further option changed has none."""
    changed = set(run["label"].split()[1:])
    for name, (_, options) in approaches.items():
        named = {f"{key}={value}" for key, value in options.items()}
        if options.items() <= run.items() and changed <= named:
            return name
    return None


TITLE = "Expert hit rate by the way of finding experts to prefetch"
draw_a = partial(_draw, "14a", TITLE, TRACKING)
BY_CACHE = "Expert hit rate of FineMoE by what its cache evicts first"
draw_b = partial(_draw, "14b", BY_CACHE, CACHING)
