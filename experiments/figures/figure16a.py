"""Figure 16a: mean semantic and trajectory similarity of the best match against store capacity."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from omegaconf import DictConfig

from experiments.figures import charts, style, traces
from experiments.figures import routing_analysis as analysis
from experiments.figures.style import Drawn

NARROWEST = 0.02
"""The least range of scores that an axis shows."""
DODGE = 16
"""How far apart, in iterations of capacity, whiskers of the same capacity are drawn."""


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write capacity.csv: capacity, stored iterations, search, score with interval."""
    capacities = list(cfg.experiment.capacities)
    traces.analyse(cfg, recorded, folder, "capacity", lambda one: scores(one, capacities))


def scores(subject: traces.Subject, capacities: list[int]) -> pd.DataFrame:
    """Return mean scores over decode iterations; trajectories as far as they predict a layer."""
    measured = subject.measured
    request = measured.request[measured.decode]
    rows = []
    for capacity in capacities:
        searched = subject.searched(capacity)
        ahead = searched.trajectory.scores[: subject.shape.layers - subject.distance].mean(axis=0)
        for search, values in (("semantic", searched.semantic.scores), ("trajectory", ahead)):
            interval = analysis.mean_with_interval(values, request)
            rows.append((capacity, searched.store.size, search, *interval))
    return pd.DataFrame(rows, columns=["capacity", "stored", "search", "score", "low", "high"])


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw a line a model: searches down, datasets across, one scale a search."""
    found = traces.read_analysis(folder)
    frame = found.table
    models, datasets = charts.facets(frame)
    looks = traces.model_looks(models)

    def panel(axes: Axes, search: str, dataset: str) -> None:
        of_search = frame[frame["search"] == search.lower()]
        for number, model in enumerate(models):
            chosen = (of_search["model"] == model) & (of_search["dataset"] == dataset)
            shift = DODGE * (number - (len(models) - 1) / 2)
            _line(axes, of_search[chosen], shift, looks[model])
        # An automatic scale would blow up differences in the third digit.
        low = min(of_search["low"].min(), 1 - NARROWEST)
        axes.set(ylim=(low - 0.05 * (1 - low), 1 + 0.02 * (1 - low)))
        axes.set_xticks(sorted(set(frame["capacity"])))
        axes.set_title(f"{search}, {style.dataset_name(dataset)}", pad=3)

    labels = "Store capacity (iterations)", "Mean similarity score (cosine)"
    with traces.panels(list(traces.SEARCHES), datasets, 2.9, labels, panel) as figure:
        traces.model_legend(figure, looks)
        return found.save(
            figure,
            place,
            "Mean score of the best match over decode iterations, in a store filled with the "
            "history. Axes do not begin at zero. Whiskers: 95 % bootstrap intervals "
            "over requests, the same at every capacity.",
        )


def _line(axes: Axes, rows: pd.DataFrame, shift: float, look: charts.Look) -> None:
    mean, spread = charts.interval(rows, "score", "low", "high")
    axes.errorbar(
        rows["capacity"] + shift, mean, spread, color=look["color"], marker=look["marker"],
        elinewidth=0.6, capsize=1.2, capthick=0.6, markeredgecolor="white", markeredgewidth=0.3,
    )  # fmt: skip
