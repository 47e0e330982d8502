"""Figure 8: mean expert hit rate against semantic and against trajectory similarity."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

LARGEST_MARKER = 60
"""Area in square points of a marker for all iterations."""
SHOWS = (
    "Hit rate of the K likeliest experts of the best match, mean in equally wide bins of its "
    "score; the area of a marker is the bin's share of decode iterations (smallest size: 15 % and "
    "below). Whiskers: 95 % bootstrap intervals over requests, none where a bin holds one request."
)


def similarity(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the hit rate of a match's K likeliest experts in equally wide bins of its score.

    By search, with intervals, how many iterations a bin holds, and their share.
    """
    frames = []
    pairs = analyses.similarity_pairs(subject, experiment.store_capacity)
    for search, (score, hits, request) in pairs.items():
        bins = routing.binned(score, hits, request, experiment.bins)
        bins.insert(0, "search", search)
        frames.append(bins.assign(share=bins["count"] / bins["count"].sum()))
    return pd.concat(frames)


analyse = partial(analyses.analyse, name="similarity", table=similarity)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a line a model: datasets down, searches across, markers as large as their share."""
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = style.model_looks(models)
    size = style.COLUMN_INCHES, 0.6 + 1.15 * len(datasets)
    with charts.panels(datasets, list(style.SEARCHES), *size) as (figure, panels):
        charts.label_once(figure, "Similarity score (cosine)", style.METRICS["hit_rate"][0])
        for axes, dataset, search in panels:
            rows = frame[(frame["search"] == search.lower()) & (frame["dataset"] == dataset)]
            charts.lines(axes, rows, "score", "hit_rate", charts.unmarked(looks), by="model")
            for model, look in looks.items():
                bins = rows[rows["model"] == model]
                mean, _ = charts.interval(bins, "hit_rate")
                area = LARGEST_MARKER * np.clip(bins["share"], 0.15, 1)
                own = {"color": look["color"], "marker": look["marker"]}
                axes.scatter(
                    bins["score"], mean, area, edgecolor="white", linewidth=0.3, zorder=3, **own
                )
            axes.set(ylim=(0, 105), yticks=(0, 25, 50, 75, 100))
            axes.set_title(f"{search}, {style.dataset_name(dataset)}", pad=3)
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(labelbottom=True)
        charts.model_legend(figure, looks)
        analyses.save(figure, output, record, frame, SHOWS)
