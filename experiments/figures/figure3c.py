"""Figure 3c: entropy of a request's expert activations as its decode iterations accumulate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments.figures import charts, style, traces
from experiments.figures import routing_analysis as analysis
from experiments.figures.style import Drawn


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write growth.csv: iterations, nats with interval, and over how many requests."""
    longest = cfg.experiment.iterations
    traces.analyse(
        cfg, recorded, folder, "growth", lambda one: growth(one.routing.iterations, longest)
    )


def growth(routed: analysis.Iterations, longest: int) -> pd.DataFrame:
    """Return the mean entropy over layers of the counts of a request's first n decode iterations.

    Over the requests that have so many, n = 1..`longest`, with 95 % intervals.
    """
    decoded = routed.at(routed.decode)
    curves = [
        analysis.entropy(one.counts[:longest].cumsum(axis=0)).mean(axis=-1)
        for one in decoded.by_request()
    ]
    rows = []
    for n in range(max(map(len, curves))):
        values = np.array([curve[n] for curve in curves if len(curve) > n])
        interval = analysis.mean_with_interval(values, np.arange(len(values)))
        rows.append((n + 1, *interval, len(values)))
    return pd.DataFrame(rows, columns=["iterations", "nats", "low", "high", "requests"])


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw a line a model with its band, datasets across."""
    found = traces.read_analysis(folder)
    frame = found.table
    models, datasets = charts.facets(frame)
    looks = traces.unmarked(traces.model_looks(models))
    with style.canvas(1, len(datasets), style.COLUMN_INCHES, 1.8) as figure:
        top = frame["high"].max() * 1.08
        for column, (axes, dataset) in enumerate(zip(figure.axes, datasets, strict=True)):
            for model in models:
                one = frame[(frame["model"] == model) & (frame["dataset"] == dataset)]
                traces.band(axes, one, "iterations", "nats", looks[model])
            axes.set(xlabel="Decode iterations", ylim=(0, top))
            axes.set_title(style.dataset_name(dataset), pad=3)
            longest = frame["iterations"].max()
            axes.set(xlim=(0, longest * 1.02), xticks=range(0, longest + 1, max(1, longest // 5)))
            axes.tick_params(axis="y", labelleft=column == 0)
        figure.axes[0].set_ylabel("Entropy (nats)")
        traces.apart(figure)
        traces.model_legend(figure, looks)
        return found.save(
            figure,
            place,
            "Entropy of the activation counts of a request's first n decode iterations, mean over "
            "layers and requests. Bands: 95 % bootstrap intervals over requests.",
            split=False,
        )
