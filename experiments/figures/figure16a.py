"""Figure 16a: mean semantic and trajectory similarity of the best match against store capacity."""

from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts
from experiments.figures.routing import mean_with_interval

NARROWEST = 0.02
"""The least range of scores that an axis shows."""
DODGE = 16
"""How far apart, in iterations of capacity, whiskers of the same capacity are drawn."""
SHOWS = (
    "Mean score of the best match over decode iterations, in a store filled with the history. Axes "
    "do not begin at zero. Whiskers: 95 % bootstrap intervals over requests, the same at every "
    "capacity."
)


def capacities(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean scores, with intervals, and how many iterations a store of a capacity holds.

    Trajectories are scored as far as they predict a layer.
    """
    measured = subject.measured
    request = measured.request[measured.decode]
    rows = []
    for capacity in experiment.capacities:
        searched = subject.searched(capacity)
        for search, scores in searched.scores(subject.distance).items():
            mean = mean_with_interval(scores, request)
            rows.append((capacity, searched.store.size, search, *mean))
    return pd.DataFrame(rows, columns=["capacity", "stored", "search", "score", "low", "high"])


analyse = partial(analyses.analyse, name="capacity", table=capacities)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a line a model: searches down, datasets across, one scale a search."""
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = style.model_looks(models)
    shift = frame["model"].map(models.index) - (len(models) - 1) / 2
    apart = frame.assign(capacity=frame["capacity"] + DODGE * shift)
    size = style.COLUMN_INCHES, 2.9
    with charts.panels(list(style.SEARCHES), datasets, *size) as (figure, panels):
        for axes, search, dataset in panels:
            rows = apart[apart["search"] == search.lower()]
            part = rows[rows["dataset"] == dataset]
            charts.lines(axes, part, "capacity", "score", looks, by="model")
            # An automatic scale would blow up differences in the third digit.
            low = min(rows["low"].min(), 1 - NARROWEST)
            axes.set(ylim=(low - 0.05 * (1 - low), 1 + 0.02 * (1 - low)))
            axes.set_xticks(sorted(set(frame["capacity"])))
            axes.set_title(f"{search}, {style.dataset_name(dataset)}")
        charts.label_once(figure, "Store capacity (iterations)", style.METRICS["score"][0])
        charts.model_legend(figure, looks)
        analyses.save(figure, output, record, frame, SHOWS)
