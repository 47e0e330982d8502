"""Figure 14a of the paper (section 6.5): expert hit rate by how experts to prefetch are found."""

from __future__ import annotations

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


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    return draw_approaches(frame, place, mixed_modes, (ID, TITLE), APPROACHES, COLOURS)


def draw_approaches(
    frame: pd.DataFrame,
    place: Path,
    mixed_modes: bool,
    names: tuple[str, str],
    approaches: dict[str, dict[str, str]],
    colours: tuple[str, ...],
) -> style.Drawn:
    """Draw hit rates of `approaches`, one panel a dataset, models as groups; `names`: id, title.

    A run belongs to the approach whose system and options it has; other runs are left out.
    """
    figure_id, title = names
    if len(frame):
        found = [_approach(row, approaches) for row in charts.rows_of(frame)]
        frame = frame.assign(approach=pd.Series(found, index=frame.index, dtype=object))
        frame = frame.dropna(subset=["approach"])
    frame = charts.checked(frame, figure_id, mixed_modes)
    mixed = frame["mode"].nunique() > 1
    marks = [f" ({mode})" if mixed else "" for mode in frame["mode"]]
    frame = frame.assign(series=[a + m for a, m in zip(frame["approach"], marks, strict=True)])
    charts.single(frame, ("model", "dataset", "series"), figure_id)
    models, datasets = charts.facets(frame)
    looks = _looks(frame, approaches, colours)
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
        gap = charts.gaps(
            frame,
            {
                "model": charts.expected_models(frame),
                "dataset": datasets,
                "series": list(looks) if mixed else list(approaches),
            },
        )
        notes = [f"Error bars: {charts.INTERVALS}, batches resampled."]
        text = charts.caption(figure_id, title, frame, notes, gap)
        return style.save(figure, data, place, figure_id, text)


def _approach(row: dict[str, Any], approaches: dict[str, dict[str, str]]) -> str | None:
    """Return the approach of a run; a run with any further option changed has none."""
    for name, options in approaches.items():
        named = {f"{key}={value}" for key, value in options.items() if key != "system"}
        changed = set(str(row["label"]).split()[1:])
        if all(row[key] == value for key, value in options.items()) and changed <= named:
            return name
    return None


def _looks(
    frame: pd.DataFrame, approaches: dict[str, dict[str, str]], colours: tuple[str, ...]
) -> dict[str, charts.Look]:
    found: dict[str, charts.Look] = {}
    for name, colour in zip(approaches, colours, strict=True):
        series = sorted(set(frame.loc[frame["approach"] == name, "series"]))
        for number, one in enumerate(series):
            found[one] = {"color": colour, "hatch": style.HATCHES[number % len(style.HATCHES)]}
    return found
