"""Similarity of prompts and iterations, and what it predicts: figures 4, 8, 9 and 16a (4.2)."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.errors import UserError
from experiments.figures import analyses, charts, routing

METHODS = {"pairs": "All pairs", "matches": "Best match"}  # the paper's, and what a store answers
PAPER = 0.84, 0.97  # the least and the largest of its twelve coefficients (figure 9)
COEFFICIENTS: dict[str, style.Look] = {
    **style.SEARCHES,
    "Bin means": {"color": "#333333", "marker": "D", "linestyle": "", "markerfacecolor": "white"},
    "Paper": {"color": "#dddddd", "hatch": ""},
}
LARGEST_MARKER = 60  # square points of a marker that stands for everything
NARROWEST = 0.02  # the least range of scores that an axis shows
DODGE = 16  # how far apart, in iterations of capacity, whiskers are drawn


@analyses.of_traces
def hit_rates(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return hit rates at distances 1..`longest_distance` by granularity, and `chance` (K/J)."""
    history, measured, shape = subject.history, subject.measured, subject.shape
    searched = subject.searched(experiment.store_capacity)
    predictors = {
        "coarse": routing.request_counts(history, measured, shape.top_k),
        "fine": routing.trajectory_map(searched, shape.top_k),
    }
    queries = measured.at(measured.decode)
    rows = []
    for name, predict in predictors.items():
        for distance in range(1, min(experiment.longest_distance + 1, shape.layers)):
            hits = routing.hit_rates(predict(distance), queries.counts[:, distance:] > 0)
            rows.append((name, distance, *routing.mean_with_interval(hits, queries.request)))
    table = pd.DataFrame(rows, columns=["granularity", "distance", "hit_rate", "low", "high"])
    return table.assign(chance=shape.top_k / shape.experts)


def draw_hit_rates(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Share of a decoded token's experts that were among the K predicted d layers before. Coarse:
    the past request of nearest activation counts; fine: the past iteration of nearest expert map.
    Bands: 95 % bootstrap intervals over requests.
    """
    record, frame = analyses.read_analysis(folder)
    frame["series"] = frame["granularity"].str.capitalize()
    models, datasets = charts.facets(frame)
    looks, longest = charts.unmarked(style.GRANULARITIES), frame["distance"].max()
    with charts.panels(models, datasets, 0.75 + 1.05 * len(models)) as (figure, panels):
        for axes, model, dataset in panels:
            part = charts.part_of(frame, model, dataset)
            charts.panel_title(axes, model, dataset)
            charts.lines(axes, part, "distance", "hit_rate", looks, band=True)
            axes.axhline(part["chance"].iloc[0] * 100, color="#333333", ls="--", lw=0.8)
            axes.set(xlim=(0, longest + 0.5), ylim=(0, 103), yticks=(0, 50, 100))
            axes.set_xticks(range(0, longest + 1, 10 if longest > 10 else 2))
        charts.label_once(figure, "Prefetch distance d (layers)", style.METRICS["hit_rate"][0])
        charts.legend(figure, {**looks, "Chance (K/J)": style.CHANCE}, columns=3)
        analyses.save(figure, output, record, frame, draw_hit_rates.__doc__)


def compared(
    subject: analyses.Subject, experiment: DictConfig
) -> Iterator[tuple[str, str, routing.Comparison]]:
    """Yield pairs of prompts, and matches of iterations, by method and search; UserError."""
    if experiment.point not in routing.POINTS:
        known = ", ".join(routing.POINTS)
        raise UserError(f"experiment.point={experiment.point} is unknown; choose one of {known}")
    searched, top_k = subject.searched(experiment.store_capacity), subject.shape.top_k
    methods = {
        "pairs": routing.compared_prompts(subject.routed, experiment.point, top_k),
        "matches": routing.compared_matches(searched, subject.measured, top_k, subject.distance),
    }
    for method, by_search in methods.items():
        yield from ((method, search, values) for search, values in by_search.items())


@analyses.of_traces
def similarity(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean hit rates in equally wide bins of similarity, by method and search."""
    frames = {}
    for method, search, values in compared(subject, experiment):
        bins = routing.binned(*values, experiment.bins)
        frames[method, search] = bins.assign(share=bins["count"] / bins["count"].sum())
    return pd.concat(frames, names=["method", "search"]).reset_index(["method", "search"])


def draw_similarity(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Mean hit rate in equally wide bins of similarity. All pairs, the paper's method: each prompt
    is one embedding and one map; the share that two have in common of their K likeliest experts.
    Best match: the hit rate, in a decode iteration, of the K likeliest experts of the stored map
    that its search found. The area of a marker is the bin's share (smallest size: 15 % and below).
    Whiskers: 95 % bootstrap intervals over requests, none where a bin holds one request.
    """
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = style.model_looks(models)
    down = list(product(METHODS, datasets))
    height = 0.6 + 1.05 * len(down)
    with charts.panels(down, list(style.SEARCHES), height) as (figure, panels):
        charts.label_once(figure, "Similarity score (cosine)", style.METRICS["hit_rate"][0])
        for axes, (method, dataset), search in panels:
            shown = {"method": method, "dataset": dataset, "search": search.lower()}
            rows = frame[(frame[list(shown)] == pd.Series(shown)).all(axis=1)]
            if search == "Semantic":
                axes.set_ylabel(METHODS[method])
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
        analyses.save(figure, output, record, frame, draw_similarity.__doc__)


@analyses.of_traces
def pearson(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the coefficient and that of figure 8's bins, by method and search."""
    rows = []
    for method, search, (score, hits, request) in compared(subject, experiment):
        bins = routing.binned(score, hits, request, experiment.bins)
        of_bins = bins["score"].corr(bins["hit_rate"])
        means = of_bins, score.mean(), hits.mean(), len(score)
        rows.append((method, search, *routing.correlation(score, hits, request), *means))
    names = ["method", "search", "pearson", "low", "high", "of_bins", "score", "hit_rate", "count"]
    return pd.DataFrame(rows, columns=names)


def draw_pearson(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Correlation of similarity and hit rate, as in figure 8: over all pairs of prompts, the
    paper's method, and over decode iterations, each with its best match. Bin means: the coefficient
    of the means of figure 8's bins. Grey: the range of the paper's twelve coefficients (LMSYS,
    ShareGPT). Whiskers: 95 % bootstrap intervals over requests.
    """
    record, frame = analyses.read_analysis(folder)
    frame["series"] = frame["search"].str.capitalize()
    models, datasets = charts.facets(frame)
    least = min(0.0, frame["low"].min() * 1.1, frame["pearson"].min() * 1.1)
    with charts.panels(list(METHODS), datasets, 3.1) as (figure, panels):
        for axes, method, dataset in panels:
            rows = frame[(frame["method"] == method) & (frame["dataset"] == dataset)]
            groups = charts.model_groups(models)
            charts.bars(axes, rows, "pearson", "model", groups, style.SEARCHES)
            # Shifts are those that `bars` gives two series.
            for search, shift in zip(style.SEARCHES, (-0.21, 0.21), strict=True):
                bins = rows[rows["series"] == search].set_index("model")["of_bins"]
                x, look = np.arange(len(models)) + shift, COEFFICIENTS["Bin means"]
                axes.plot(x, bins.reindex(models), ms=3, mew=0.6, zorder=4, **look)
            if method == "pairs":
                axes.axhspan(*PAPER, color=COEFFICIENTS["Paper"]["color"], lw=0, zorder=0)
                axes.set_title(style.dataset_name(dataset))
            axes.axhline(0, color="#333333", lw=0.6)
            label = f"{METHODS[method]}\n{style.METRICS['pearson'][0]}"
            axes.set(ylim=(least, 1.05), ylabel=label)
            axes.label_outer()
        charts.legend(figure, COEFFICIENTS, "bar")
        analyses.save(figure, output, record, frame, draw_pearson.__doc__)


@analyses.of_traces
def capacity(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean scores with intervals, and how many iterations a store of a capacity holds."""
    measured = subject.measured
    request = measured.request[measured.decode]
    rows = []
    for size in experiment.capacities:
        searched = subject.searched(size)
        for search, scores in searched.scores(subject.distance).items():
            mean = routing.mean_with_interval(scores, request)
            rows.append((size, searched.store.size, search, *mean))
    return pd.DataFrame(rows, columns=["capacity", "stored", "search", "score", "low", "high"])


def draw_capacity(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Mean score of the best match over decode iterations, in a store filled with the history. Axes
    do not begin at zero. Whiskers: 95 % bootstrap intervals over requests, the same at every
    capacity.
    """
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = style.model_looks(models)
    shift = frame["model"].map(models.index) - (len(models) - 1) / 2
    apart = frame.assign(capacity=frame["capacity"] + DODGE * shift)
    with charts.panels(list(style.SEARCHES), datasets, 2.9) as (figure, panels):
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
        analyses.save(figure, output, record, frame, draw_capacity.__doc__)
