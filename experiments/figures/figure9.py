"""Figure 9: Pearson coefficient of similarity and expert hit rate."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments.figures import charts, style, traces
from experiments.figures import routing_analysis as analysis
from experiments.figures.style import Drawn


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write pearson.csv: search, pearson with interval, mean score and hit rate, iterations."""
    capacity = cfg.experiment.store_capacity
    traces.analyse(cfg, recorded, folder, "pearson", lambda one: coefficients(one, capacity))


def coefficients(subject: traces.Subject, capacity: int) -> pd.DataFrame:
    """Return the coefficient over decode iterations for each search, K experts predicted."""
    pairs = traces.similarity_pairs(subject, capacity)
    rows = []
    for search, group in pairs.groupby("search"):
        score, hits = group["score"].to_numpy(), group["hit_rate"].to_numpy()
        found = analysis.correlation(score, hits, group["request"].to_numpy())
        rows.append((search, *found, score.mean(), hits.mean(), len(group)))
    names = ["search", "pearson", "low", "high", "score", "hit_rate", "iterations"]
    return pd.DataFrame(rows, columns=names)


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw a bar a search for each model, datasets across; n/a where nothing varies."""
    found = traces.read_analysis(folder)
    frame = found.table
    models, datasets = charts.facets(frame)
    with style.canvas(1, len(datasets), style.COLUMN_INCHES, 1.9) as figure:
        least = min(0.0, frame["low"].min() * 1.1, frame["pearson"].min() * 1.1)
        for column, (axes, dataset) in enumerate(zip(figure.axes, datasets, strict=True)):
            of_dataset = frame[frame["dataset"] == dataset]
            traces.paired_bars(axes, of_dataset, "search", "pearson", traces.SEARCHES, models)
            axes.axhline(0, color="#333333", lw=0.6)
            axes.set_title(style.dataset_name(dataset), pad=3)
            axes.set_ylim(least, 1)
            axes.tick_params(axis="y", labelleft=column == 0)
        figure.axes[0].set_ylabel("Pearson coefficient")
        charts.legend(figure, traces.SEARCHES, "bar")
        return found.save(
            figure,
            place,
            "Correlation, over decode iterations, of the best match's similarity score and the "
            "hit rate of the K likeliest experts of its map. Whiskers: 95 % bootstrap intervals "
            "over requests.",
        )
