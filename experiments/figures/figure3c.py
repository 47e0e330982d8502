"""Figure 3c: entropy of a request's expert activations as its decode iterations accumulate."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

SHOWS = (
    "Entropy of the activation counts of a request's first n decode iterations, mean over layers "
    "and requests. Bands: 95 % bootstrap intervals over requests."
)


def growth(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return the mean entropy over layers of the counts of a request's first n decode iterations.

    Over the requests that have so many, n = 1..`iterations`, with 95 % intervals.
    """
    decoded = subject.routed.at(subject.routed.decode)
    curves = [
        routing.entropy(one.counts[: experiment.iterations].cumsum(axis=0)).mean(axis=-1)
        for one in decoded.by_request()
    ]
    rows = []
    for n in range(max(map(len, curves))):
        values = np.array([curve[n] for curve in curves if len(curve) > n])
        mean = routing.mean_with_interval(values, np.arange(len(values)))
        rows.append((n + 1, *mean, len(values)))
    return pd.DataFrame(rows, columns=["iterations", "nats", "low", "high", "requests"])


analyse = partial(analyses.analyse, name="growth", table=growth)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a line a model with its band, datasets across."""
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = charts.unmarked(style.model_looks(models))
    longest = frame["iterations"].max()
    with charts.panels([""], datasets, style.COLUMN_INCHES, 1.8) as (figure, panels):
        for axes, _, dataset in panels:
            rows = frame[frame["dataset"] == dataset]
            charts.bands(axes, rows, "iterations", "nats", "model", looks)
            axes.set(ylim=(0, frame["high"].max() * 1.08), ylabel=style.METRICS["nats"][0])
            axes.set(xlim=(0, longest * 1.02), xticks=range(0, longest + 1, max(1, longest // 5)))
            axes.set_xlabel("Decode iterations")
            axes.set_title(style.dataset_name(dataset))
            axes.label_outer()
        charts.apart(figure)
        charts.model_legend(figure, looks)
        analyses.save(figure, output, record, frame, SHOWS, split=False)
