"""Figure 9: Pearson coefficient of similarity and expert hit rate."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts
from experiments.figures.routing import correlation

SHOWS = (
    "Correlation, over decode iterations, of the best match's similarity score and the hit rate of "
    "the K likeliest experts of its map. Whiskers: 95 % bootstrap intervals over requests."
)


def coefficients(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the coefficient over decode iterations for each search, K experts predicted.

    With its interval, the mean score and hit rate, and how many iterations there are.
    """
    rows = []
    pairs = analyses.similarity_pairs(subject, experiment.store_capacity)
    for search, (score, hits, request) in pairs.items():
        means = score.mean(), hits.mean()
        rows.append((search, *correlation(score, hits, request), *means, len(score)))
    names = ["search", "pearson", "low", "high", "score", "hit_rate", "iterations"]
    return pd.DataFrame(rows, columns=names)


analyse = partial(analyses.analyse, name="pearson", table=coefficients)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a bar a search for each model, datasets across; n/a where nothing varies."""
    record, frame = analyses.read_analysis(folder)
    frame["series"] = frame["search"].str.capitalize()
    models, datasets = charts.facets(frame)
    least = min(0.0, frame["low"].min() * 1.1, frame["pearson"].min() * 1.1)
    with charts.panels([""], datasets, style.COLUMN_INCHES, 1.9) as (figure, panels):
        for axes, _, dataset in panels:
            rows = frame[frame["dataset"] == dataset]
            groups = charts.model_groups(models)
            charts.bars(axes, rows, "pearson", "model", groups, style.SEARCHES)
            axes.axhline(0, color="#333333", lw=0.6)
            axes.set_title(style.dataset_name(dataset), pad=3)
            axes.set(ylim=(least, 1), ylabel=style.METRICS["pearson"][0])
            axes.label_outer()
        charts.legend(figure, style.SEARCHES, "bar")
        analyses.save(figure, output, record, frame.drop(columns="series"), SHOWS)
