"""What the figures of run records share: cells of a sweep, bars, lines, legend and caption."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.errors import UserError
from experiments.figures.style import (
    COLOURS,
    DASHES,
    DATASETS,
    HATCHES,
    MARKERS,
    METRICS,
    MODELS,
    SYSTEMS,
    dataset_name,
    model_name,
    ordered,
    system_name,
)
from experiments.frame import one_mode

INTERVALS = "95 % bootstrap intervals of the mean"
SHOWN_GAPS = 6
REFERENCE_DASHES = (0, (3, 1.2))
Look = dict[str, Any]


def checked(frame: pd.DataFrame, figure: str, mixed_modes: bool) -> pd.DataFrame:
    """Return a copy of the records of a figure; raise UserError if there are none, or of two modes.

    The copy has a column `series`: the display name of the system, with its options other than the
    default and, where modes are mixed, its mode.
    """
    if frame.empty:
        raise UserError(
            f"figure {figure}: no run records; run python -m experiments.reproduce {figure}"
        )
    one_mode(frame, f"figure {figure}", mixed_modes)
    mixed = frame["mode"].nunique() > 1
    names = []
    for row in rows_of(frame):
        options = row["label"].removeprefix(row["system"]).strip()
        notes = [note for note in (options, row["mode"] if mixed else "") if note]
        names.append(system_name(row["system"]) + (f" ({', '.join(notes)})" if notes else ""))
    return frame.assign(series=names)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame, column to value."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def single(frame: pd.DataFrame, keys: Sequence[str], figure: str) -> None:
    """Raise UserError if two records fall on the same place of a figure, told apart by `keys`."""
    for _, same in frame.groupby(list(keys), dropna=False):
        if len(same) > 1:
            first, second = same["path"].iloc[:2]
            raise UserError(
                f"figure {figure}: {first} and {second} are of one cell; draw them apart"
            )


def looks(frame: pd.DataFrame) -> dict[str, Look]:
    """Return colour, marker, line and hatch of each series, in the order of drawing.

    A system has one colour everywhere; its variants, or its modes where they are mixed, differ in
    line and hatch.
    """
    found: dict[str, Look] = {}
    for system in ordered(frame["system"], SYSTEMS):
        # Sorted by length, the plain system comes before its variants.
        series = sorted(
            set(frame.loc[frame["system"] == system, "series"]), key=lambda s: (len(s), s)
        )
        for number, name in enumerate(series):
            found[name] = {
                "color": COLOURS.get(system, "#666666"),
                "marker": MARKERS.get(system, "o"),
                "linestyle": DASHES[number % len(DASHES)],
                "hatch": HATCHES[number % len(HATCHES)],
            }
    return found


def bars(
    axes: Axes,
    frame: pd.DataFrame,
    metric: str,
    groups: Mapping[str, str],
    styles: Mapping[str, Look],
    by: str,
    hollow: Sequence[str] = (),
) -> None:
    """Draw a group of bars for each of `groups` (value of column `by` to its name), from zero.

    A bar for each series, always at its place, so that a missing record is a gap. Bars of the
    series in `hollow` are not filled.
    """
    _, factor = METRICS[metric]
    width = 0.84 / len(styles)
    for place, (name, look) in enumerate(styles.items()):
        offset = (place - (len(styles) - 1) / 2) * width
        for group, value in enumerate(groups):
            one = frame[(frame["series"] == name) & (frame[by] == value)]
            if one.empty or not np.isfinite(one[metric].iloc[0]):
                continue
            mean, spread = interval(one, metric)
            if mean[0] == 0:
                # An empty bar is not a gap.
                axes.annotate("0", (group + offset, 0), ha="center", va="bottom", fontsize=7)
                continue
            fill = "white" if name in hollow else look["color"]
            edge = look["color"] if name in hollow else "white"
            axes.bar(
                group + offset,
                mean[0] * factor,
                width * 0.92,
                color=fill,
                edgecolor=edge,
                linewidth=0.8 if name in hollow else 0.3,
                hatch=look["hatch"],
                zorder=2,
            )
            axes.errorbar(
                group + offset, mean * factor, spread * factor, fmt="none", ecolor="#333333",
                elinewidth=0.7, capsize=min(1.5, 12 * width), capthick=0.7, zorder=3,
            )  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups.values()))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)


def references(
    axes: Axes,
    frame: pd.DataFrame,
    metric: str,
    groups: Mapping[str, str],
    styles: Mapping[str, Look],
    by: str,
) -> None:
    """Draw the mean of each series as a line across each group of bars that `bars` drew."""
    _, factor = METRICS[metric]
    for name, look in styles.items():
        for group, value in enumerate(groups):
            one = frame[(frame["series"] == name) & (frame[by] == value)]
            axes.hlines(
                one[metric] * factor, group - 0.46, group + 0.46, look["color"], REFERENCE_DASHES,
                lw=1.2, zorder=4,
            )  # fmt: skip


def percent_axis(axes: Axes) -> None:
    """Let the vertical axis run from 0 to 100, with room for the cap of an interval."""
    axes.set_ylim(0, 103)
    axes.set_yticks(range(0, 101, 20))


def line(
    axes: Axes,
    frame: pd.DataFrame,
    x: str,
    metric: str,
    look: Look,
    places: Sequence[float] | None = None,
) -> None:
    """Draw the mean of one series over `x`, with its intervals.

    The line breaks at those of `places` where the series has no record; None: the series' own.
    """
    _, factor = METRICS[metric]
    rows = frame.sort_values(x)
    if places is not None:
        rows = rows.set_index(x).reindex(list(places)).rename_axis(x).reset_index()
    mean, spread = interval(rows, metric)
    axes.errorbar(
        rows[x], mean * factor, spread * factor, color=look["color"], marker=look["marker"],
        linestyle=look["linestyle"], elinewidth=0.7, capsize=1.5, capthick=0.7,
        markeredgecolor="white", markeredgewidth=0.3,
    )  # fmt: skip


def interval(rows: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return means, and how far their intervals reach down and up: (2, n); 0 where unknown."""
    mean = rows[metric].to_numpy(dtype=float)
    low = rows[f"{metric}_low"].to_numpy(dtype=float)
    high = rows[f"{metric}_high"].to_numpy(dtype=float)
    # A percentile interval can just miss its own mean; an error bar cannot point inwards.
    return mean, np.nan_to_num(np.clip(np.stack([mean - low, high - mean]), 0, None))


def legend(
    figure: Figure,
    styles: Mapping[str, Look],
    kind: str,
    columns: int = 5,
    referred: Mapping[str, Look] | None = None,
) -> None:
    """Put one legend above all panels; `kind` is bar or line, `referred` what `references` drew."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for name, look in styles.items():
        if kind == "bar":
            edge = "white" if look["hatch"] else look["color"]
            handles.append(
                Patch(facecolor=look["color"], hatch=look["hatch"], edgecolor=edge, label=name)
            )
        else:
            shape = {key: look[key] for key in ("color", "marker", "linestyle")}
            handles.append(Line2D([], [], **shape, label=name))
    for name, look in (referred or {}).items():
        handles.append(Line2D([], [], color=look["color"], ls=REFERENCE_DASHES, label=name))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(columns, len(handles)),
        frameon=False,
        handlelength=1.6 if kind == "bar" else 2.4,
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.1,
    )


def gaps(frame: pd.DataFrame, expected: Mapping[str, Sequence[Any]]) -> str:
    """Say which combinations of the `expected` values of columns have no row; empty if none.

    Values that are missing altogether are named once, without their combinations.
    """
    absent, present = [], {}
    for column, values in expected.items():
        found = [value for value in values if value in set(frame[column])]
        absent += [_shown(column, value) for value in values if value not in found]
        present[column] = found
    # Aligned with the columns of `expected`.
    have = set(frame[list(expected)].itertuples(index=False, name=None))
    single_gaps = [
        " / ".join(_shown(column, value) for column, value in zip(expected, cell, strict=True))
        for cell in itertools.product(*present.values())
        if cell not in have
    ]
    if len(single_gaps) > SHOWN_GAPS:
        rest = len(single_gaps) - SHOWN_GAPS
        single_gaps = [*single_gaps[:SHOWN_GAPS], f"{rest} more"]
    return "; ".join([*absent, *single_gaps])


def expected_models(frame: pd.DataFrame) -> list[str]:
    """Return the paper's models and whichever others are there."""
    return [*MODELS, *(one for one in ordered(frame["model"], MODELS) if one not in MODELS)]


def expected_series(frame: pd.DataFrame, systems: Sequence[str]) -> list[str]:
    """Return the series that are there, and the plain series of `systems` that are not."""
    there = list(looks(frame))
    seen = set(frame["system"])
    return there + [system_name(one) for one in systems if one not in seen]


def caption(figure: str, title: str, frame: pd.DataFrame, notes: Sequence[str], gap: str) -> str:
    """Return a caption that says what was measured, how, on what, and what is missing."""
    names = [dataset_name(one) for one in ordered(frame["dataset"], DATASETS)]
    budgets = sorted(set(frame["memory_budget"]), key=_by_size)
    share = budgets[0] if len(budgets) == 1 else f"{len(budgets)} sizes"
    unit = "" if share.endswith(("%", "sizes")) else " GB"
    low, high = int(frame["requests"].min()), int(frame["requests"].max())
    count = f"{low}" if low == high else f"{low} to {high}"
    parts = [
        f"Figure {figure}: {title}.",
        f"Mode: {_listed(frame['mode'])}; testbed: {_listed(frame['testbed'])}; "
        f"{_weights(frame)}; dataset{'s' if len(names) > 1 else ''}: {', '.join(names)}; "
        f"expert memory: {share}{unit}; n = {count} requests a run.",
        *notes,
    ]
    if gap:
        parts.append(f"Not run, left out or drawn as gaps: {gap}.")
    return " ".join(parts)


def _weights(frame: pd.DataFrame) -> str:
    by_kind = frame.groupby("weights", sort=True)["model"]
    if by_kind.ngroups == 1:
        listed = str(frame["weights"].iloc[0])
    else:
        listed = ", ".join(
            f"{kind} ({', '.join(model_name(one) for one in ordered(list(models), MODELS))})"
            for kind, models in by_kind
        )
    small = " (small trained stand-ins; bytes are those of the full-size models)"
    return f"weights: {listed}{small if 'scale' in set(frame['weights']) else ''}"


def _listed(values: pd.Series) -> str:
    return ", ".join(sorted(map(str, values.unique())))


def _by_size(budget: str) -> float:
    return float(budget.rstrip("%"))


def _shown(column: str, value: Any) -> str:
    if column == "model":
        return model_name(value)
    if column == "dataset":
        return dataset_name(value)
    if column == "series":
        return str(value)
    units = {"limit_gb": "{:g} GB", "batch_size": "batch {:g}", "prefetch_distance": "d = {:g}"}
    return units[column].format(value) if column in units else str(value)


def panel_title(axes: Axes, model: str, dataset: str | None) -> None:
    """Name a panel after its model and, where there are several, its dataset."""
    axes.set_title(model_name(model) + (f", {dataset_name(dataset)}" if dataset else ""), pad=3)


def facets(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the models and the datasets that are there, in the order of drawing."""
    return ordered(frame["model"], MODELS), ordered(frame["dataset"], DATASETS)


COLUMNS = ("series", "system", "label", "model", "dataset", "memory_budget", "memory_budget_gb")


def drawn_data(
    frame: pd.DataFrame, metrics: Sequence[str], more: Sequence[str] = ()
) -> pd.DataFrame:
    """Return what a figure's CSV holds: names, metrics with intervals, mode and source."""
    values = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    named = [*COLUMNS, *(one for one in more if one not in COLUMNS)]
    return frame[[*named, *values, "requests", "mode", "testbed", "weights", "digest"]].sort_values(
        ["model", "dataset", "series"], kind="stable"
    )
