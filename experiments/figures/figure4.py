"""Figure 4: expert hit rate against prefetch distance, coarse and fine, K experts predicted each.

Coarse is the past request of nearest activation counts, as MoE-Infinity tracks them; fine is the
past iteration of nearest expert map (trajectory search, section 4.2.2).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from experiments import routing_predictors as prediction
from experiments.figures import charts, style, traces
from experiments.figures.style import Drawn

CHANCE: dict[str, Any] = {"color": "#333333", "linestyle": "--", "linewidth": 0.8}


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write hit_rates.csv: granularity, distance, hit_rate with interval, chance (K/J)."""
    found = list(traces.subjects(cfg, recorded))
    tables = [hit_rates(one, cfg.experiment) for one in found]
    traces.write_analysis(cfg, folder, {"hit_rates": traces.over_subjects(found, tables)}, found)


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
    frame = found.tables["hit_rates"]
    models, datasets = charts.facets(frame)
    height = 0.6 + 1.05 * len(models)
    with style.canvas(len(models), len(datasets), style.COLUMN_INCHES, height) as figure:
        panels = traces.grid(figure, len(datasets))
        for (row, model), (column, dataset) in product(enumerate(models), enumerate(datasets)):
            axes = panels[row][column]
            chosen = frame[(frame["model"] == model) & (frame["dataset"] == dataset)]
            for name, look in traces.GRANULARITIES.items():
                one = chosen[chosen["granularity"] == name.lower()]
                traces.band(axes, one, "distance", "hit_rate", look, 100)
            axes.axhline(chosen["chance"].iloc[0] * 100, **CHANCE)
            axes.set(xlim=(0, frame["distance"].max() + 0.5), ylim=(0, 103), yticks=(0, 50, 100))
            charts.panel_title(axes, model, dataset)
            axes.tick_params(labelleft=column == 0, labelbottom=row == len(models) - 1)
        figure.supxlabel("Prefetch distance d (layers)", fontsize=style.POINTS)
        figure.supylabel("Expert hit rate (%)", fontsize=style.POINTS)
        traces.apart(figure)
        looks = {**traces.GRANULARITIES, "Chance (K/J)": CHANCE}
        charts.legend(figure, traces.unmarked(looks), "line")
        caption = found.caption(
            "Share of a decoded token's experts that were among the K predicted d layers before. "
            "Coarse: the past request of nearest activation counts; fine: the past iteration of "
            "nearest expert map. Bands: 95 % bootstrap intervals over requests."
        )
        return style.save(figure, frame, place, found.record["id"], caption)
