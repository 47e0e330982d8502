"""Figure 8: mean expert hit rate against semantic and against trajectory similarity (4.2.3).

By the paper's method, over all pairs of prompts, and by ours: what a match predicts.
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

LARGEST_MARKER = 60
"""Area in square points of a marker that stands for everything."""
SHOWS = (
    "Mean hit rate in equally wide bins of similarity. All pairs, the paper's method: each prompt "
    "is one embedding and one map; the share that two have in common of their K likeliest experts. "
    "Best match: the hit rate, in a decode iteration, of the K likeliest experts of the stored map "
    "that its search found. The area of a marker is the bin's share (smallest size: 15 % and "
    "below). Whiskers: 95 % bootstrap intervals over requests, none where a bin holds one request."
)


def similarity(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean hit rates in equally wide bins of similarity, by method and search.

    With intervals, how many pairs or iterations a bin holds, and their share.
    """
    frames = {}
    compared = analyses.compared(subject, experiment.store_capacity, experiment.point)
    for method, by_search in compared.items():
        for search, values in by_search.items():
            bins = routing.binned(*values, experiment.bins)
            frames[method, search] = bins.assign(share=bins["count"] / bins["count"].sum())
    return pd.concat(frames, names=["method", "search"]).reset_index(["method", "search"])


analyse = partial(analyses.analyse, name="similarity", table=similarity)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a line a model: methods and datasets down, searches across; markers show the share."""
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = style.model_looks(models)
    down = list(product(analyses.METHODS, datasets))
    size = style.COLUMN_INCHES, 0.6 + 1.05 * len(down)
    with charts.panels(down, list(style.SEARCHES), *size) as (figure, panels):
        charts.label_once(figure, "Similarity score (cosine)", style.METRICS["hit_rate"][0])
        for axes, (method, dataset), search in panels:
            shown = {"method": method, "dataset": dataset, "search": search.lower()}
            rows = frame[(frame[list(shown)] == pd.Series(shown)).all(axis=1)]
            if search == "Semantic":
                axes.set_ylabel(analyses.METHODS[method])
            charts.lines(axes, rows, "score", "hit_rate", charts.unmarked(looks), by="model")
            for model, look in looks.items():
                bins = rows[rows["model"] == model]
                mean, _ = charts.interval(bins, "hit_rate")
                area = LARGEST_MARKER * np.clip(bins["share"], 0.15, 1)
                shape: style.Look = {"s": area, "color": look["color"], "marker": look["marker"]}
                axes.scatter(bins["score"], mean, **shape, ec="white", linewidth=0.3, zorder=3)
            axes.set(ylim=(0, 105), yticks=(0, 25, 50, 75, 100))
            axes.set_title(f"{search}, {style.dataset_name(dataset)}")
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(labelbottom=True)
        charts.model_legend(figure, looks)
        analyses.save(figure, output, record, frame, SHOWS)
