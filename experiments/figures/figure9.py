"""Figure 9: Pearson coefficient of similarity and expert hit rate (4.2.3), both as in figure 8."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

PAPER = 0.84, 0.97
"""The least and the largest of the paper's twelve coefficients."""
LOOKS: dict[str, style.Look] = {
    **style.SEARCHES,
    "Bin means": {"color": "#333333", "marker": "D", "linestyle": "", "markerfacecolor": "white"},
    "Paper": {"color": "#dddddd", "hatch": ""},
}
SHOWS = (
    "Correlation of similarity and hit rate, as in figure 8: over all pairs of prompts, the "
    "paper's method, and over decode iterations, each with its best match. Bin means: the "
    "coefficient of the means of figure 8's bins. Grey: the range of the paper's twelve "
    "coefficients (LMSYS, ShareGPT). Whiskers: 95 % bootstrap intervals over requests."
)


def coefficients(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the coefficient over pairs or iterations, with its interval, by method and search.

    With that of the means of figure 8's bins, the mean score and hit rate, and their number.
    """
    rows = []
    compared = analyses.compared(subject, experiment.store_capacity, experiment.point)
    for method, by_search in compared.items():
        for search, (score, hits, request) in by_search.items():
            bins = routing.binned(score, hits, request, experiment.bins)
            of_bins = bins["score"].corr(bins["hit_rate"])
            means = of_bins, score.mean(), hits.mean(), len(score)
            rows.append((method, search, *routing.correlation(score, hits, request), *means))
    names = ["method", "search", "pearson", "low", "high", "of_bins", "score", "hit_rate", "count"]
    return pd.DataFrame(rows, columns=names)


analyse = partial(analyses.analyse, name="pearson", table=coefficients)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a bar a search for each model: methods down, datasets across; n/a if nothing varies."""
    record, frame = analyses.read_analysis(folder)
    frame["series"] = frame["search"].str.capitalize()
    models, datasets = charts.facets(frame)
    least = min(0.0, frame["low"].min() * 1.1, frame["pearson"].min() * 1.1)
    methods = list(analyses.METHODS)
    with charts.panels(methods, datasets, style.COLUMN_INCHES, 3.1) as (figure, panels):
        for axes, method, dataset in panels:
            rows = frame[(frame["method"] == method) & (frame["dataset"] == dataset)]
            groups = charts.model_groups(models)
            charts.bars(axes, rows, "pearson", "model", groups, style.SEARCHES)
            # Shifts are those that `bars` gives two series.
            for search, shift in zip(style.SEARCHES, (-0.21, 0.21), strict=True):
                bins = rows[rows["series"] == search].set_index("model")["of_bins"]
                x = np.arange(len(models)) + shift
                axes.plot(x, bins.reindex(models), ms=3, mew=0.6, zorder=4, **LOOKS["Bin means"])
            if method == "pairs":
                axes.axhspan(*PAPER, color=LOOKS["Paper"]["color"], lw=0, zorder=0)
                axes.set_title(style.dataset_name(dataset))
            axes.axhline(0, color="#333333", lw=0.6)
            label = f"{analyses.METHODS[method]}\n{style.METRICS['pearson'][0]}"
            axes.set(ylim=(least, 1.05), ylabel=label)
            axes.label_outer()
        charts.legend(figure, LOOKS, "bar")
        analyses.save(figure, output, record, frame.drop(columns="series"), SHOWS)
