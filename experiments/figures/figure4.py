"""Figure 4: expert hit rate against prefetch distance, coarse and fine, K experts predicted each.

Coarse is the past request of nearest activation counts, as MoE-Infinity tracks them; fine is the
past iteration of nearest expert map (trajectory search, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from experiments.figures import charts, traces
from experiments.figures import routing_predictors as prediction
from experiments.figures.style import Drawn

LOOKS = {name.lower(): look for name, look in traces.unmarked(traces.GRANULARITIES).items()}


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write hit_rates.csv: granularity, distance, hit_rate with interval, chance (K/J)."""
    traces.analyse(cfg, recorded, folder, "hit_rates", lambda one: hit_rates(one, cfg.experiment))


def hit_rates(subject: traces.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return hit rates at distances 1..`longest_distance`, as far as the model has layers."""
    history, measured, top_k = subject.history, subject.measured, subject.shape.top_k
    searched = subject.searched(experiment.store_capacity)
    named = {
        "coarse": prediction.request_counts(history, measured, top_k),
        "fine": prediction.trajectory_map(searched, top_k),
    }
    distances = range(1, experiment.longest_distance + 1)
    rates = prediction.hit_rates_by_distance(named, measured, distances)
    chance = top_k / subject.shape.experts
    return rates.rename(columns={"predictor": "granularity"}).assign(chance=chance)


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw coarse and fine with their bands, models down and datasets across."""
    found = traces.read_analysis(folder)
    frame = found.table.rename(columns={"granularity": "predictor"})
    with rate_panels(frame, LOOKS) as figure:
        return found.save(
            figure,
            place,
            "Share of a decoded token's experts that were among the K predicted d layers before. "
            "Coarse: the past request of nearest activation counts; fine: the past iteration of "
            "nearest expert map. Bands: 95 % bootstrap intervals over requests.",
        )


@contextmanager
def rate_panels(frame: pd.DataFrame, looks: Mapping[str, charts.Look]) -> Iterator[Figure]:
    """Yield a figure of hit rate over distance, a band for each predictor that has a look.

    `frame` has model, dataset, predictor, distance, hit_rate with its interval, and chance.
    """

    longest = frame["distance"].max()

    def panel(axes: Axes, rows: pd.DataFrame) -> None:
        for name, look in looks.items():
            traces.band(axes, rows[rows["predictor"] == name], "distance", "hit_rate", look, 100)
        axes.axhline(rows["chance"].iloc[0] * 100, color=traces.CHANCE["color"], ls="--", lw=0.8)
        axes.set(xlim=(0, longest + 0.5), ylim=(0, 103), yticks=(0, 50, 100))
        axes.set_xticks(range(0, longest + 1, 10 if longest > 10 else 2))

    labels = "Prefetch distance d (layers)", "Expert hit rate (%)"
    named = {name.capitalize(): look for name, look in looks.items()}
    with traces.model_panels(frame, labels, panel) as figure:
        columns = 3 if len(looks) < 3 else 2
        charts.legend(figure, {**named, "Chance (K/J)": traces.CHANCE}, "line", columns)
        yield figure
