"""Figure 4: expert hit rate against prefetch distance, coarse and fine, K experts predicted each.

Coarse is the past request of nearest activation counts, as MoE-Infinity tracks them; fine is the
past iteration of nearest expert map (trajectory search, section 4.2.2).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

LOOKS = {name.lower(): look for name, look in charts.unmarked(style.GRANULARITIES).items()}
SHOWS = (
    "Share of a decoded token's experts that were among the K predicted d layers before. Coarse: "
    "the past request of nearest activation counts; fine: the past iteration of nearest expert "
    "map. Bands: 95 % bootstrap intervals over requests."
)


def hit_rates(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return hit rates at distances 1..`longest_distance`, as far as the model has layers.

    By granularity and distance, with 95 % intervals, and `chance` (K/J).
    """
    history, measured, shape = subject.history, subject.measured, subject.shape
    searched = subject.searched(experiment.store_capacity)
    named = {
        "coarse": routing.request_counts(history, measured, shape.top_k),
        "fine": routing.trajectory_map(searched, shape.top_k),
    }
    distances = range(1, experiment.longest_distance + 1)
    rates = routing.hit_rates_by_distance(named, measured, distances)
    chance = shape.top_k / shape.experts
    return rates.rename(columns={"predictor": "granularity"}).assign(chance=chance)


analyse = partial(analyses.analyse, name="hit_rates", table=hit_rates)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw coarse and fine with their bands, models down and datasets across."""
    record, frame = analyses.read_analysis(folder)
    with rate_panels(frame, "granularity", LOOKS) as figure:
        analyses.save(figure, output, record, frame, SHOWS)


@contextmanager
def rate_panels(frame: pd.DataFrame, by: str, looks: Mapping[str, style.Look]) -> Iterator[Figure]:
    """Yield a figure of hit rate over distance, a band for each value of column `by` with a look.

    `frame` has model, dataset, `by`, distance, hit_rate with its interval, and chance.
    """
    longest = frame["distance"].max()
    labels = "Prefetch distance d (layers)", style.METRICS["hit_rate"][0]
    with charts.model_panels(frame, *labels) as (figure, panels):
        for axes, part in panels:
            charts.bands(axes, part, "distance", "hit_rate", by, looks)
            axes.axhline(part["chance"].iloc[0] * 100, color="#333333", ls="--", lw=0.8)
            axes.set(xlim=(0, longest + 0.5), ylim=(0, 103), yticks=(0, 50, 100))
            axes.set_xticks(range(0, longest + 1, 10 if longest > 10 else 2))
        named = {name.capitalize(): look for name, look in looks.items()}
        columns = 3 if len(looks) < 3 else 2
        charts.legend(figure, {**named, "Chance (K/J)": style.CHANCE}, columns=columns)
        yield figure
