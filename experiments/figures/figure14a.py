"""Figure 14a of the paper (section 6.5): expert hit rate by how experts to prefetch are found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.figures import charts, style

ID = "14a"
TITLE = "Expert hit rate by the way of finding experts to prefetch"
METRIC = "hit_rate"
APPROACHES = {
    "Speculate": {"system": "promoe", "predictor": "gate"},
    "Hit count": {"system": "moe_infinity"},
    "Map (T)": {"system": "finemoe", "search": "trajectory", "selection": "top_k"},
    "Map (T+S)": {"system": "finemoe", "search": "both", "selection": "top_k"},
    "Map (T+S+δ)": {"system": "finemoe", "search": "both", "selection": "delta"},
}
"""Each approach of the paper, and the system and options that stand for it."""
# Maps grow darker with each feature; the others have the colours of their systems.
COLOURS = ("#56B4E9", "#009E73", "#F9C9A3", "#EE8A45", "#B34700")
NOTES = (f"Error bars: {charts.INTERVALS}, batches resampled.",)


def draw_approaches(
    names: tuple[str, str],
    approaches: dict[str, dict[str, str]],
    colours: tuple[str, ...],
    frame: pd.DataFrame,
    place: Path,
    mixed_modes: bool = False,
) -> style.Drawn:
    """Draw hit rates of `approaches`, one panel a dataset, models as groups; `names`: id, title.

    A run belongs to the approach whose system and options it has; other runs are left out.
    """
    if len(frame):
        found = [_approach(row, approaches) for row in charts.rows_of(frame)]
        frame = frame.assign(approach=pd.Series(found, index=frame.index, dtype=object))
        frame = frame.dropna(subset=["approach"])
    frame = charts.checked(frame, names[0], mixed_modes)
    frame = frame.assign(series=frame["approach"] + charts.marks(frame))
    charts.single(frame, names[0])
    models, datasets = charts.facets(frame)
    base = {name: (colour, "") for name, colour in zip(approaches, colours, strict=True)}
    looks = charts.variants(frame, "approach", base)
    groups = {one: style.model_name(one) for one in models}
    with style.canvas(len(datasets), 1, style.COLUMN_INCHES, 0.65 + 1.35 * len(datasets)) as figure:
        for axes, dataset in zip(figure.axes, datasets, strict=True):
            part = frame[frame["dataset"] == dataset]
            charts.bars(axes, part, METRIC, groups, looks, "model")
            charts.percent_axis(axes)
            axes.set_ylabel(style.METRICS[METRIC][0])
            if len(datasets) > 1:
                axes.set_title(style.dataset_name(dataset), pad=3)
        charts.legend(figure, looks, "bar", 3)
        data = charts.drawn_data(frame, [METRIC], ["approach"])
        series = list(looks if frame["mode"].nunique() > 1 else approaches)
        return charts.save(figure, place, names, frame, data, NOTES, series=series)


def _approach(row: dict[str, Any], approaches: dict[str, dict[str, str]]) -> str | None:
    """Return the approach of a run; a run with any further option changed has none."""
    for name, options in approaches.items():
        named = {f"{key}={value}" for key, value in options.items() if key != "system"}
        changed = set(str(row["label"]).split()[1:])
        if all(row[key] == value for key, value in options.items()) and changed <= named:
            return name
    return None


draw = partial(draw_approaches, (ID, TITLE), APPROACHES, COLOURS)
