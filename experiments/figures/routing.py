"""Pictures of the routing report: what is found of each layer, and hit rates over the distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from experiments.figures import charts, style, traces
from experiments.figures.figure4 import rate_panels
from experiments.figures.style import Drawn

Facts = Sequence[Mapping[str, Any]]
"""What a record says of each model and dataset (`traces.Analysed`)."""


@dataclass(frozen=True)
class ByLayer:
    """Columns of a table that are drawn over its layers, beside its column `uniform`."""

    title: str
    label: str
    """Of the vertical axes."""
    lines: Mapping[str, tuple[str, charts.Look]]
    """Column to its name in the legend and its look."""
    uniform: str
    """Name of what uniform routing would give."""
    told: str


# Of no model, no system and no granularity.
_PLAIN: charts.Look = {"color": "#6A51A3", "marker": "", "linestyle": "-"}
_DOTTED = {**_PLAIN, "linestyle": ":"}
_COARSE, _FINE = traces.unmarked(traces.GRANULARITIES).values()
BY_LAYER = {
    "load_balance": ByLayer(
        "Load of experts by layer",
        "Load / fair share",
        {
            "largest": ("Most used", _PLAIN),
            "smallest": ("Least used", _DOTTED),
        },
        "Fair share",
        "Share of the prompts' tokens that the most and the least used expert of a layer got, over "
        "the share 1/J that each would get of equal ones.",
    ),
    "entropy": ByLayer(
        "Entropy by layer",
        "Entropy (nats)",
        {
            "coarse": ("Coarse, counts", _COARSE),
            "fine_gate": ("Fine, gate", _FINE),
            "fine_counts": ("Fine, counts", {**_FINE, "linestyle": ":"}),
        },
        "Uniform (ln J)",
        "Of the activation counts of a whole request (coarse), and of the gate probabilities and "
        "the counts of one decode iteration (fine), means over requests or iterations; the counts "
        "of an iteration give ln K by construction.",
    ),
    "overlap": ByLayer(
        "Overlap of consecutive tokens by layer",
        "Share of experts in common",
        {"overlap": ("Overlap", _PLAIN)},
        "Chance (K/J)",
        "Share of a decoded token's experts that the token before it used as well.",
    ),
}


def draw_by_layer(name: str, table: pd.DataFrame, facts: Facts, place: Path) -> Drawn:
    """Draw one of `BY_LAYER`, models down and datasets across, as `<place>/<name>`.

    `table` has model, dataset, layer, the quantity's columns and `uniform`, all of it drawn.
    """
    one = BY_LAYER[name]
    lines = {**one.lines, "uniform": (one.uniform, traces.CHANCE)}
    top = table[list(lines)].to_numpy().max() * 1.05

    def panel(axes: Axes, rows: pd.DataFrame) -> None:
        for column, (_, look) in lines.items():
            width = 0.8 if column == "uniform" else 1.2
            axes.plot(rows["layer"], rows[column], c=look["color"], ls=look["linestyle"], lw=width)
        axes.set(ylim=(0, top), xlim=(0, table["layer"].max()))

    with traces.model_panels(table, ("Layer", one.label), panel) as figure:
        charts.legend(figure, dict(lines.values()), "line", 2 if len(lines) == 4 else 3)
        caption = _caption(one.title, one.told, facts, split=False)
        return style.save(figure, table, place, name, caption)


def draw_rates(table: pd.DataFrame, facts: Facts, place: Path) -> Drawn:
    """Draw the hit rate of every predictor over the prefetch distance as `<place>/hit_rates`."""
    there = set(table["predictor"])
    looks = {name: look for name, look in traces.PREDICTORS.items() if name in there}
    told = (
        "Share of a decoded token's experts that were among the K predicted d layers before, by: "
        "the experts that the history used most (popularity); the past request of nearest "
        "activation counts; the request's previous token; the layer's own gate, given the hidden "
        "state of d layers before (target gate); the past iteration of nearest embedding (map, "
        "semantic) or of nearest gate outputs up to then (map, trajectory). "
        "Bands: 95 % bootstrap intervals over requests."
    )
    with rate_panels(table, looks) as figure:
        caption = _caption("Expert hit rate of predictors", told, facts, split=True)
        return style.save(figure, table, place, "hit_rates", caption)


def _caption(title: str, told: str, facts: Facts, split: bool) -> str:
    record = {"label": "Routing report", "title": title, "mode": traces.MODE, "subjects": facts}
    return traces.Analysed(record).caption(told, split)
