"""Figure 8: mean expert hit rate against semantic and against trajectory similarity."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from omegaconf import DictConfig

from experiments import routing_analysis as analysis
from experiments.figures import charts, style, traces
from experiments.figures.style import Drawn

LARGEST_MARKER = 60
"""Area in square points of a marker for all iterations."""


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write similarity.csv: search, score, hit_rate with interval, count, share of the bin."""
    found = list(traces.subjects(cfg, recorded))
    tables = [similarity(one, cfg.experiment) for one in found]
    traces.write_analysis(cfg, folder, {"similarity": traces.over_subjects(found, tables)}, found)


def similarity(subject: traces.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the hit rate of a match's K likeliest experts in equally wide bins of its score."""
    pairs = traces.similarity_pairs(
        subject.path, subject.distance, subject.cut, experiment.store_capacity
    )
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
    frame = found.tables["similarity"]
    models, datasets = charts.facets(frame)
    looks, searches = traces.model_looks(models), list(traces.SEARCHES)
    height = 0.6 + 1.15 * len(datasets)
    with style.canvas(len(datasets), len(searches), style.COLUMN_INCHES, height) as figure:
        panels = traces.grid(figure, len(searches))
        for (row, dataset), (column, search) in product(enumerate(datasets), enumerate(searches)):
            axes = panels[row][column]
            for model in models:
                chosen = (frame["model"] == model) & (frame["dataset"] == dataset)
                one = frame[chosen & (frame["search"] == search.lower())]
                _line(axes, one, looks[model])
            axes.set(ylim=(0, 105), yticks=(0, 25, 50, 75, 100))
            axes.set_title(f"{search}, {style.dataset_name(dataset)}", pad=3)
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="y", labelleft=column == 0)
        figure.supxlabel("Similarity score (cosine)", fontsize=style.POINTS)
        figure.supylabel("Expert hit rate (%)", fontsize=style.POINTS)
        traces.apart(figure)
        charts.legend(figure, traces.by_display_name(looks), "line")
        caption = found.caption(
            "Hit rate of the K likeliest experts of the best match, mean in equally wide bins of "
            "its score; the area of a marker is the bin's share of decode iterations (smallest "
            "size: 15 % and below). Whiskers: 95 % bootstrap intervals over requests, none where a "
            "bin holds one request."
        )
        return style.save(figure, frame, place, found.record["id"], caption)


def _line(axes: Axes, bins: pd.DataFrame, look: charts.Look) -> None:
    mean, spread = traces.whiskers(bins, "hit_rate")
    axes.errorbar(
        bins["score"], mean * 100, spread * 100, color=look["color"], lw=0.9, elinewidth=0.6
    )
    area = LARGEST_MARKER * np.clip(bins["share"], 0.15, 1)
    axes.scatter(
        bins["score"], mean * 100, area, color=look["color"], marker=look["marker"],
        edgecolor="white", linewidth=0.3, zorder=3,
    )  # fmt: skip
