"""Figure 8: mean expert hit rate against semantic and against trajectory similarity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from omegaconf import DictConfig

from experiments.figures import charts, style, traces
from experiments.figures import routing_analysis as analysis
from experiments.figures.style import Drawn

LARGEST_MARKER = 60
"""Area in square points of a marker for all iterations."""


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write similarity.csv: search, score, hit_rate with interval, count, share of the bin."""
    traces.analyse(cfg, recorded, folder, "similarity", lambda one: similarity(one, cfg.experiment))


def similarity(subject: traces.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the hit rate of a match's K likeliest experts in equally wide bins of its score."""
    pairs = traces.similarity_pairs(subject, experiment.store_capacity)
    frames = []
    for search, group in pairs.groupby("search"):
        score, hits, request = (group[name].to_numpy() for name in ("score", "hit_rate", "request"))
        bins = analysis.binned(score, hits, request, experiment.bins)
        frames.append(bins.assign(share=bins["count"] / len(group), search=search))
    joined = pd.concat(frames, ignore_index=True)
    return joined[["search", "score", "hit_rate", "low", "high", "count", "share"]]


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw a line a model: datasets down, searches across, markers as large as their share."""
    found = traces.read_analysis(folder)
    frame = found.table
    models, datasets = charts.facets(frame)
    looks = traces.model_looks(models)

    def panel(axes: Axes, dataset: str, search: str) -> None:
        for model in models:
            chosen = (frame["model"] == model) & (frame["dataset"] == dataset)
            _line(axes, frame[chosen & (frame["search"] == search.lower())], looks[model])
        axes.set(ylim=(0, 105), yticks=(0, 25, 50, 75, 100))
        axes.set_title(f"{search}, {style.dataset_name(dataset)}", pad=3)
        axes.locator_params(axis="x", nbins=4)

    labels = "Similarity score (cosine)", "Expert hit rate (%)"
    height = 0.6 + 1.15 * len(datasets)
    with traces.panels(datasets, list(traces.SEARCHES), height, labels, panel) as figure:
        for axes in figure.axes:
            axes.tick_params(labelbottom=True)
        traces.model_legend(figure, looks)
        return found.save(
            figure,
            place,
            "Hit rate of the K likeliest experts of the best match, mean in equally wide bins of "
            "its score; the area of a marker is the bin's share of decode iterations (smallest "
            "size: 15 % and below). Whiskers: 95 % bootstrap intervals over requests, none where a "
            "bin holds one request.",
        )


def _line(axes: Axes, bins: pd.DataFrame, look: charts.Look) -> None:
    mean, spread = charts.interval(bins, "hit_rate", "low", "high")
    axes.errorbar(
        bins["score"], mean * 100, spread * 100, color=look["color"], lw=0.9, elinewidth=0.6
    )
    area = LARGEST_MARKER * np.clip(bins["share"], 0.15, 1)
    axes.scatter(
        bins["score"], mean * 100, area, color=look["color"], marker=look["marker"],
        edgecolor="white", linewidth=0.3, zorder=3,
    )  # fmt: skip
