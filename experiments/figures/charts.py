"""What the figures of run records share: cells of a sweep, bars, lines, legend and caption."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.errors import UserError
from experiments.figures import style
from experiments.judge.frame import one_mode

INTERVALS = "95 % bootstrap intervals of the mean"
SHOWN_GAPS = 6
REFERENCE_DASHES = (0, (3, 1.2))
Look = dict[str, Any]


def checked(frame: pd.DataFrame, figure: str, mixed_modes: bool, **only: str) -> pd.DataFrame:
    """Return a copy of the records that have the values `only`; UserError for none or two modes.

    The copy has a column `series`: the display name of the system, with its options other than the
    default and, where modes are mixed, its mode.
    """
    for column, value in only.items():
        frame = frame[frame[column] == value] if len(frame) else frame
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
        names.append(style.system_name(row["system"]) + (f" ({', '.join(notes)})" if notes else ""))
    return frame.assign(series=names)


def marks(frame: pd.DataFrame) -> pd.Series:
    """Return what to write behind a series that is not named after its system: a mixed mode."""
    mixed = frame["mode"].nunique() > 1
    return " (" + frame["mode"] + ")" if mixed else pd.Series("", index=frame.index)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame, column to value."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def single(frame: pd.DataFrame, figure: str, *keys: str) -> None:
    """Raise UserError if two records of one model, dataset, series and `keys` are to be drawn."""
    for _, same in frame.groupby(["model", "dataset", "series", *keys], dropna=False):
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
    systems = style.ordered(frame["system"], style.SYSTEMS)
    base = {
        one: (style.COLOURS.get(one, "#666666"), style.MARKERS.get(one, "o")) for one in systems
    }
    return variants(frame, "system", base)


def variants(
    frame: pd.DataFrame, column: str, base: Mapping[str, tuple[str, str]]
) -> dict[str, Look]:
    """Return the look of each series: colour and marker by its value of a column, as `base` says.

    Series of the same value differ in line and hatch.
    """
    found: dict[str, Look] = {}
    for value, (colour, marker) in base.items():
        # Sorted by length, the plain series comes before its variants.
        series = set(frame.loc[frame[column] == value, "series"])
        for number, name in enumerate(sorted(series, key=lambda one: (len(one), one))):
            found[name] = {
                "color": colour,
                "marker": marker,
                "linestyle": style.DASHES[number % len(style.DASHES)],
                "hatch": style.HATCHES[number % len(style.HATCHES)],
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
    references: Mapping[str, Look] | None = None,
) -> None:
    """Draw a group of bars for each of `groups` (value of column `by` to its name), from zero.

    A bar for each series, always at its place, so that a missing record is a gap. Bars of the
    series in `hollow` are not filled; `references` are lines across each group.
    """
    centres = {value: place for place, value in enumerate(groups)}
    _, factor = style.METRICS[metric]
    width = 0.84 / len(styles)
    for place, (name, look) in enumerate(styles.items()):
        rows = frame[(frame["series"] == name) & np.isfinite(frame[metric])]
        x = rows[by].map(centres).to_numpy(dtype=float) + (place - (len(styles) - 1) / 2) * width
        # An empty bar is not a gap.
        for empty in x[(rows[metric] == 0).to_numpy()]:
            axes.annotate("0", (empty, 0), ha="center", va="bottom", fontsize=7)
        x, rows = x[(rows[metric] != 0).to_numpy()], rows[rows[metric] != 0]
        mean, spread = interval(rows, metric)
        fill, edge = look["color"], "white"
        if name in hollow:
            fill, edge = edge, fill
        axes.bar(
            x, mean * factor, width * 0.92, color=fill, edgecolor=edge, hatch=look["hatch"],
            linewidth=0.8 if name in hollow else 0.3, zorder=2,
        )  # fmt: skip
        axes.errorbar(
            x, mean * factor, spread * factor, fmt="none", ecolor="#333333", elinewidth=0.7,
            capsize=min(1.5, 12 * width), capthick=0.7, zorder=3,
        )  # fmt: skip
    for name, look in (references or {}).items():
        rows = frame[frame["series"] == name]
        x = rows[by].map(centres).to_numpy(dtype=float)
        axes.hlines(
            rows[metric] * factor, x - 0.46, x + 0.46, look["color"], REFERENCE_DASHES, lw=1.2,
            zorder=4,
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups.values()))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)


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
    _, factor = style.METRICS[metric]
    rows = frame.sort_values(x)
    if places is not None:
        rows = rows.set_index(x).reindex(list(places)).rename_axis(x).reset_index()
    mean, spread = interval(rows, metric)
    axes.errorbar(
        rows[x], mean * factor, spread * factor, color=look["color"], marker=look["marker"],
        linestyle=look["linestyle"], elinewidth=0.7, capsize=1.5, capthick=0.7,
        markeredgecolor="white", markeredgewidth=0.3,
    )  # fmt: skip


def interval(rows: pd.DataFrame, metric: str, *ends: str) -> tuple[np.ndarray, np.ndarray]:
    """Return means, and how far their intervals reach down and up: (2, n); 0 where unknown.

    `ends` name the columns of low and high; by default those of a `run_frame`.
    """
    columns = (metric, *(ends or (f"{metric}_low", f"{metric}_high")))
    mean, low, high = (rows[one].to_numpy(dtype=float) for one in columns)
    # A percentile interval can just miss its own mean; an error bar cannot point inwards.
    return mean, np.nan_to_num(np.clip(np.stack([mean - low, high - mean]), 0, None))


def legend(
    figure: Figure,
    styles: Mapping[str, Look],
    kind: str,
    columns: int = 5,
    narrow: int | None = None,
    references: Mapping[str, Look] | None = None,
) -> None:
    """Put one legend above all panels; `kind` is bar or line, `references` as `bars` drew them.

    In `columns` columns, or `narrow` ones where the figure is narrower than a page.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    fitting = narrow if narrow and figure.get_figwidth() < style.PAGE_INCHES else columns
    handles: list[Any] = []
    for name, look in styles.items():
        if kind == "bar":
            edge = "white" if look["hatch"] else look["color"]
            drawn = {"facecolor": look["color"], "hatch": look["hatch"], "edgecolor": edge}
            handles.append(Patch(**drawn, label=name))
        else:
            shape = {key: look[key] for key in ("color", "marker", "linestyle")}
            handles.append(Line2D([], [], **shape, label=name))
    for name, look in (references or {}).items():
        handles.append(Line2D([], [], color=look["color"], ls=REFERENCE_DASHES, label=name))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(fitting, len(handles)),
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
    lacking = [cell for cell in itertools.product(*present.values()) if cell not in have]
    shown = [" / ".join(map(_shown, expected, cell)) for cell in lacking[:SHOWN_GAPS]]
    if len(lacking) > SHOWN_GAPS:
        shown.append(f"{len(lacking) - SHOWN_GAPS} more")
    return "; ".join([*absent, *shown])


def expected_series(frame: pd.DataFrame, systems: Sequence[str] = style.PAPER_SYSTEMS) -> list[str]:
    """Return the series that are there, and the plain series of `systems` that are not."""
    there = list(looks(frame))
    seen = set(frame["system"])
    return there + [style.system_name(one) for one in systems if one not in seen]


def save(
    figure: Figure,
    place: Path,
    names: tuple[str, str],
    frame: pd.DataFrame,
    data: pd.DataFrame,
    notes: Sequence[str],
    **expected: Sequence[Any],
) -> style.Drawn:
    """Save a figure, the data drawn, and a caption: what was measured, how, on what, what lacks.

    `names` are id and title. Beside every model and dataset, the values of columns that `expected`
    names should be there.
    """
    models, datasets = facets(frame)
    usual = {"model": list(dict.fromkeys([*style.MODELS, *models])), "dataset": datasets}
    gap = gaps(frame, {**usual, **expected})
    budgets = sorted(set(frame["memory_budget"]), key=lambda one: float(one.rstrip("%")))
    share = budgets[0] if len(budgets) == 1 else f"{len(budgets)} sizes"
    unit = "" if share.endswith(("%", "sizes")) else " GB"
    low, high = int(frame["requests"].min()), int(frame["requests"].max())
    count = f"{low}" if low == high else f"{low} to {high}"
    parts = [
        f"Figure {names[0]}: {names[1]}.",
        f"Mode: {_listed(frame['mode'])}; testbed: {_listed(frame['testbed'])}; "
        f"{served(frame, '; bytes are those of the full-size models')}; "
        f"expert memory: {share}{unit}; n = {count} requests a run.",
        *notes,
    ]
    if gap:
        parts.append(f"Not run, left out or drawn as gaps: {gap}.")
    return style.save(figure, data, place, names[0], " ".join(parts))


def served(frame: pd.DataFrame, stand_ins: str) -> str:
    """Say whose weights and which datasets; `stand_ins` goes on about small trained weights."""
    kinds = {
        str(kind): ", ".join(map(style.model_name, style.ordered(models, style.MODELS)))
        for kind, models in frame.groupby("weights", sort=True)["model"]
    }
    several = len(kinds) > 1
    listed = ", ".join(f"{kind} ({of})" if several else kind for kind, of in kinds.items())
    small = f" (small trained stand-ins{stand_ins})" if "scale" in set(frame["weights"]) else ""
    names = [style.dataset_name(one) for one in style.ordered(frame["dataset"], style.DATASETS)]
    plural = "s" if len(names) > 1 else ""
    return f"weights: {listed}{small}; dataset{plural}: {', '.join(names)}"


def _listed(values: pd.Series) -> str:
    return ", ".join(sorted(map(str, values.unique())))


def _shown(column: str, value: Any) -> str:
    if column == "model":
        return style.model_name(value)
    if column == "dataset":
        return style.dataset_name(value)
    if column == "series":
        return str(value)
    units = {"limit_gb": "{:g} GB", "batch_size": "batch {:g}", "prefetch_distance": "d = {:g}"}
    return units[column].format(value) if column in units else str(value)


def panel_title(axes: Axes, model: str, dataset: str | None) -> None:
    """Name a panel after its model and, where there are several, its dataset."""
    axes.set_title(
        style.model_name(model) + (f", {style.dataset_name(dataset)}" if dataset else ""), pad=3
    )


def facets(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the models and the datasets that are there, in the order of drawing."""
    return style.ordered(frame["model"], style.MODELS), style.ordered(
        frame["dataset"], style.DATASETS
    )


def width_of(models: Sequence[str]) -> float:
    """Return the inches of a figure: a page's for several models side by side."""
    return style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES


@contextmanager
def dataset_panels(
    frame: pd.DataFrame,
    labels: tuple[str, str],
    panel: Callable[[Axes, pd.DataFrame], None],
    marker_points: float = 3.5,
) -> Iterator[Figure]:
    """Yield a figure where `panel` drew the rows of each dataset (down) and model (across).

    `labels` are those of the horizontal and the vertical axes.
    """
    models, datasets = facets(frame)
    size = width_of(models), 0.6 + 1.7 * len(datasets)
    with style.canvas(len(datasets), len(models), *size, marker_points) as figure:
        cells = itertools.product(datasets, models)
        for axes, (dataset, model) in zip(figure.axes, cells, strict=True):
            panel(axes, frame[(frame["model"] == model) & (frame["dataset"] == dataset)])
            panel_title(axes, model, dataset if len(datasets) > 1 else None)
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1] if model == models[0] else "")
        yield figure


@contextmanager
def metric_panels(
    frame: pd.DataFrame,
    metrics: Sequence[str],
    height: float,
    panel: Callable[[Axes, pd.DataFrame, str], None],
) -> Iterator[Figure]:
    """Yield a figure where `panel` drew each of `metrics` (down) of every model (across)."""
    models, _ = facets(frame)
    with style.canvas(len(metrics), len(models), width_of(models), height) as figure:
        cells = itertools.product(metrics, models)
        for axes, (metric, model) in zip(figure.axes, cells, strict=True):
            panel(axes, frame[frame["model"] == model], metric)
            if metric == metrics[0]:
                panel_title(axes, model, None)
            if model == models[0]:
                axes.set_ylabel(style.METRICS[metric][0])
        figure.align_ylabels()
        yield figure


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
