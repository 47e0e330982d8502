"""What figures share: cells of a sweep, panels, bars, lines, legends, captions and their files."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from experiments import style
from experiments.errors import UserError
from experiments.style import POINTS, Look, dataset_name, model_name, system_name
from finemoe.files import atomic_write, write_csv

INTERVALS = "95 % bootstrap intervals of the mean"
BUDGET = "Memory for experts (GB, share of all)"
REFERENCE_DASHES = (0, (3, 1.2))
CAPS: Look = {"elinewidth": 0.7, "capsize": 1.5, "capthick": 0.7}
EDGE: Look = {"markeredgecolor": "white", "markeredgewidth": 0.3}
SETTINGS: Any = {
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize"), POINTS),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), POINTS - 0.5),
    "axes.linewidth": 0.6,
    "axes.titlepad": 3,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}


def checked(frame: pd.DataFrame, figure: str, mixed_modes: bool, **only: str) -> pd.DataFrame:
    """Return a copy of the records that have the values `only`; UserError for none or two modes.

    The copy has a column `series`: the display name of the system, with its options other than the
    default and, where modes are mixed, its mode.
    """
    for column, value in only.items():
        frame = frame[frame[column] == value] if len(frame) else frame
    if frame.empty:
        raise UserError(f"{figure}: no run records; run python -m experiments.reproduce {figure}")
    modes = sorted(frame["mode"].unique())
    if len(modes) > 1 and not mixed_modes:
        raise UserError(f"figure {figure} mixes {' and '.join(modes)}; set mixed_modes=true")
    names = []
    for system, label, mode in frame[["system", "label", "mode"]].itertuples(index=False):
        notes = ", ".join(filter(None, (label.partition(" ")[2], mode if len(modes) > 1 else "")))
        names.append(system_name(system) + (f" ({notes})" if notes else ""))
    return frame.assign(series=names)


def named_after(names: pd.Series, frame: pd.DataFrame) -> pd.Series:
    """Return names of series, with their mode where modes are mixed."""
    return names + " (" + frame["mode"] + ")" if frame["mode"].nunique() > 1 else names


def single(frame: pd.DataFrame, figure: str, *keys: str) -> None:
    """Raise UserError if two records of one model, dataset, series and `keys` are to be drawn."""
    cell = ["model", "dataset", "series", *keys]
    for _, same in frame[frame.duplicated(cell, keep=False)].groupby(cell, dropna=False):
        first, second = same["path"].iloc[:2]
        raise UserError(f"figure {figure}: {first} and {second} are of one cell; draw them apart")


def looks(frame: pd.DataFrame, references: Collection[str] = ()) -> dict[str, Look]:
    """Return the look of each series, in the order of drawing; a system has one colour everywhere.

    Its variants, or its modes where they are mixed, differ in line and hatch. Systems that are
    `references`, none of those that are compared, are dashed lines.
    """
    systems = style.ordered(frame["system"], style.SYSTEMS)
    styled = variants(frame, "system", {system: style.system_look(system) for system in systems})
    for name in set(frame.loc[frame["system"].isin(references), "series"]):
        colour = styled[name]["color"]
        styled[name] = {"color": colour, "marker": "", "linestyle": REFERENCE_DASHES}
    return styled


def variants(
    frame: pd.DataFrame, column: str, base: Mapping[str, tuple[str, str]]
) -> dict[str, Look]:
    """Return the look of each series: colour and marker by its value of a column, as `base` says.

    Series of the same value differ in line and hatch.
    """
    styled: dict[str, Look] = {}
    for value, (colour, marker) in base.items():
        # Sorted by length, the plain series comes before its variants.
        series = sorted(set(frame.loc[frame[column] == value, "series"]), key=lambda s: (len(s), s))
        endless = zip(itertools.cycle(style.DASHES), itertools.cycle(style.HATCHES), strict=True)
        for name, (dashes, hatch) in zip(series, endless, strict=False):
            styled[name] = {"color": colour, "marker": marker, "linestyle": dashes, "hatch": hatch}
    return styled


def facets(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the models and the datasets that are there, in the order of drawing."""
    models = style.ordered(frame["model"], style.MODELS)
    return models, style.ordered(frame["dataset"], style.DATASETS)


Panels = Iterator[tuple[Figure, list[tuple[Axes, Any, Any]]]]


@contextmanager
def panels(
    rows: Sequence[Any], columns: Sequence[Any], height: float, width: float = style.COLUMN_INCHES
) -> Panels:
    """Yield a figure, `width` x `height` inches, and each panel with its row and column."""
    matplotlib.use("Agg")
    with sns.axes_style("whitegrid"), sns.plotting_context("paper"), plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(
            len(rows), len(columns), figsize=(width, height), layout="constrained", squeeze=False
        )
        try:
            for axes in grid.flat:
                axes.tick_params(length=2, pad=2)
                sns.despine(ax=axes)
            cells = itertools.product(rows, columns)
            yield figure, [(axes, *cell) for axes, cell in zip(grid.flat, cells, strict=True)]
        finally:
            plt.close(figure)


@contextmanager
def dataset_panels(
    frame: pd.DataFrame, xlabel: str, metric: str
) -> Iterator[tuple[Figure, list[tuple[Axes, pd.DataFrame]]]]:
    """Yield a figure, and a panel with its rows for each dataset (down) and model (across)."""
    models, datasets = facets(frame)
    height = 0.6 + 1.7 * len(datasets)
    with panels(datasets, models, height, width_of(models)) as (figure, cells):
        for axes, dataset, model in cells:
            panel_title(axes, model, dataset if len(datasets) > 1 else None)
            axes.set(xlabel=xlabel, ylabel=style.METRICS[metric][0] if model == models[0] else "")
        yield figure, [(axes, part_of(frame, model, dataset)) for axes, dataset, model in cells]


@contextmanager
def metric_panels(frame: pd.DataFrame, metrics: Sequence[str], height: float) -> Panels:
    """Yield a figure, and a panel for each metric (down) and model (across)."""
    models, _ = facets(frame)
    with panels(metrics, models, height, width_of(models)) as (figure, cells):
        for axes, metric, model in cells:
            if metric == metrics[0]:
                panel_title(axes, model)
            if model == models[0]:
                axes.set_ylabel(style.METRICS[metric][0])
        figure.align_ylabels()
        yield figure, cells


def part_of(frame: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """Return the rows of a model on a dataset."""
    return frame[(frame["model"] == model) & (frame["dataset"] == dataset)]


def width_of(models: Sequence[object]) -> float:
    """Return the inches of a figure: a page's for several models side by side."""
    return style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES


def model_groups(models: Sequence[str]) -> dict[str, str]:
    """Return the names of models in two lines, to stand below narrow bars."""
    return {model: "\n".join(model_name(model).rsplit("-", 1)) for model in models}


def panel_title(axes: Axes, model: str, dataset: str | None = None) -> None:
    """Name a panel after its model and, where there are several, its dataset."""
    axes.set_title(model_name(model) + (f", {dataset_name(dataset)}" if dataset else ""))


def label_once(figure: Figure, xlabel: str, ylabel: str) -> None:
    """Label the axes of all panels once, and the ticks of the outer ones alone."""
    for axes in figure.axes:
        axes.label_outer()
    figure.supxlabel(xlabel, fontsize=POINTS)
    figure.supylabel(ylabel, fontsize=POINTS)
    apart(figure)


def apart(figure: Figure) -> None:
    """Leave room between panels, so that outer tick labels of neighbours do not meet."""
    figure.set_layout_engine("constrained", wspace=0.06)


def interval(rows: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return means in the axis's unit, and how far their intervals reach down and up: (2, n).

    The ends are columns `<metric>_low` and `<metric>_high`, or `low` and `high`; 0 where unknown.
    """
    ends = (f"{metric}_low", f"{metric}_high") if f"{metric}_low" in rows else ("low", "high")
    mean, low, high = (rows[column].to_numpy(dtype=float) for column in (metric, *ends))
    _, factor = style.METRICS[metric]
    # A percentile interval can just miss its own mean; an error bar cannot point inwards.
    spread = np.nan_to_num(np.clip(np.stack([mean - low, high - mean]), 0, None))
    return mean * factor, spread * factor


def bars(
    axes: Axes,
    frame: pd.DataFrame,
    metric: str,
    by: str,
    groups: Mapping[str, str],
    looks: Mapping[str, Look],
    hollow: Collection[str] = (),
) -> None:
    """Draw a group of bars for each of `groups` (value of column `by` to its name), from zero.

    A bar for each series of `looks` that has a hatch, always where it belongs, so that a missing
    record is a gap; those in `hollow` are not filled. Others are lines across the groups.
    """
    centres = {value: number for number, value in enumerate(groups)}
    solid = [name for name, look in looks.items() if "hatch" in look]
    width = 0.84 / max(1, len(solid))
    for name, look in looks.items():
        rows = frame[frame["series"] == name]
        centre = rows[by].map(centres).to_numpy(dtype=float)
        mean, spread = interval(rows, metric)
        if name not in solid:
            ends = centre - 0.46, centre + 0.46
            axes.hlines(mean, *ends, look["color"], REFERENCE_DASHES, lw=1.2, zorder=4)
            continue
        x = centre + (solid.index(name) - (len(solid) - 1) / 2) * width
        # An empty bar is not a gap.
        for note, empty in (("0", mean == 0), ("n/a", np.isnan(mean))):
            for position in x[empty]:
                axes.annotate(note, (position, 0), ha="center", va="bottom", fontsize=7)
        full = np.nan_to_num(mean) != 0
        x, mean, spread = x[full], mean[full], spread[:, full]
        fill, edge = ("white", look["color"]) if name in hollow else (look["color"], "white")
        axes.bar(
            x, mean, width * 0.92, color=fill, edgecolor=edge, hatch=look["hatch"],
            linewidth=0.8 if name in hollow else 0.3, zorder=2,
        )  # fmt: skip
        caps = {**CAPS, "capsize": min(1.5, 12 * width)}
        axes.errorbar(x, mean, spread, fmt="none", ecolor="#333333", zorder=3, **caps)
    axes.set_xticks(range(len(groups)), list(groups.values()))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    if metric == "hit_rate":
        # With room for the cap of an interval.
        axes.set(ylim=(0, 103), yticks=range(0, 101, 20))


def lines(
    axes: Axes,
    frame: pd.DataFrame,
    x: str,
    metric: str,
    looks: Mapping[str, Look],
    at: Sequence[float] | None = None,
    by: str = "series",
    band: bool = False,
) -> None:
    """Draw means with intervals, or a `band`, over `x`; breaks where no record is of `at`."""
    for name, look in looks.items():
        rows = frame[frame[by] == name].sort_values(x)
        if at is not None:
            rows = rows.set_index(x).reindex(list(at)).rename_axis(x).reset_index()
        mean, (down, up) = interval(rows, metric)
        if band:
            axes.plot(rows[x], mean, **_line(look), **EDGE)
            axes.fill_between(rows[x], mean - down, mean + up, color=look["color"], alpha=0.2, lw=0)
        else:
            axes.errorbar(rows[x], mean, (down, up), **_line(look), **CAPS, **EDGE)


def budget_axis(axes: Axes, frame: pd.DataFrame) -> None:
    """Tick the budgets of a panel: GB, and the share of all experts where one was asked for."""
    budgets = frame.sort_values("memory_budget_gb").drop_duplicates("memory_budget_gb")
    asked = budgets["memory_budget"]
    shares = asked.where(asked.str.endswith("%"), "").str.replace("%", " %")
    gigabytes = budgets["memory_budget_gb"]
    axes.set_xticks(
        gigabytes, [f"{gb:.3g}\n{of}" for gb, of in zip(gigabytes, shares, strict=True)]
    )


def log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with ticks at 1, 2, 5, 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def unmarked(looks: Mapping[str, Look]) -> dict[str, Look]:
    """Return looks of lines without markers."""
    return {name: {**look, "marker": ""} for name, look in looks.items()}


def _line(look: Look) -> Look:
    return {name: value for name, value in look.items() if name != "hatch"}


def legend(
    figure: Figure,
    looks: Mapping[str, Look],
    kind: str = "line",
    columns: int = 5,
    narrow: int | None = None,
    hollow: Collection[str] = (),
) -> None:
    """Put one legend above all panels; `kind` is bar or line; bars in `hollow` are not filled.

    In `columns` columns, or `narrow` ones where the figure is narrower than a page.
    """
    if narrow and figure.get_figwidth() < style.PAGE_INCHES:
        columns = narrow
    handles: list[Any] = []
    for name, look in looks.items():
        if kind == "bar" and "hatch" in look:
            edge = "white" if look["hatch"] and name not in hollow else look["color"]
            fill = "white" if name in hollow else look["color"]
            handles.append(Patch(facecolor=fill, hatch=look["hatch"], edgecolor=edge, label=name))
        else:
            handles.append(Line2D([], [], **_line(look), label=name))
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


def model_legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    """Name models by their lines above all panels."""
    legend(figure, {model_name(model): look for model, look in looks.items()})


def save(
    figure: Figure,
    output: Path,
    name: str,
    doc: str | None,
    frame: pd.DataFrame,
    metrics: Sequence[str],
    *more: str,
) -> None:
    """Save a figure of runs with the `caption` of `doc`; its data are `metrics` and `more`."""
    named = ["series", "system", "label", "model", "dataset", "memory_budget", "memory_budget_gb"]
    values = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    source = ["requests", "mode", "testbed", "weights", "digest"]
    data = frame[[*named, *more, *values, *source]]
    data = data.sort_values(["model", "dataset", "series"], kind="stable")
    write(figure, data, output, name, caption(name, doc, frame))


def caption(name: str, doc: str | None, frame: pd.DataFrame) -> str:
    """Return a caption: the title of a docstring, how measured and on what, what follows below."""
    title, _, notes = (doc or "").partition("\n\n")
    budgets = frame["memory_budget"].unique()
    memory = budgets[0] if budgets[0].endswith("%") else f"{budgets[0]} GB"
    memory = memory if len(budgets) == 1 else f"{len(budgets)} sizes"
    requests = sorted({frame["requests"].min(), frame["requests"].max()})
    count = " to ".join(map(str, requests))
    modes, testbeds = (", ".join(sorted(set(frame[key]))) for key in ("mode", "testbed"))
    return (
        f"Figure {name}: {title.strip(' .')}. Mode: {modes}; testbed: {testbeds}; "
        f"{served(frame, '; bytes are those of the full-size models')}; "
        f"expert memory: {memory}; n = {count} requests a run. {notes}"
    )


def served(frame: pd.DataFrame, stand_ins: str) -> str:
    """Say whose weights and which datasets; `stand_ins` goes on about small trained weights."""
    kinds = {
        str(kind): ", ".join(map(model_name, style.ordered(models, style.MODELS)))
        for kind, models in frame.groupby("weights", sort=True)["model"]
    }
    listed = ", ".join(f"{kind} ({of})" if len(kinds) > 1 else kind for kind, of in kinds.items())
    small = f" (small trained stand-ins{stand_ins})" if "scale" in kinds else ""
    datasets = style.ordered(frame["dataset"], style.DATASETS)
    plural = "s" if len(datasets) > 1 else ""
    return f"weights: {listed}{small}; dataset{plural}: {', '.join(map(dataset_name, datasets))}"


def write(figure: Figure, data: pd.DataFrame, output: Path, name: str, caption: str) -> None:
    """Write `<output>/<name>` as png, pdf, csv (the data) and txt (the caption)."""
    for kind, metadata in (("png", None), ("pdf", {"CreationDate": None})):
        with atomic_write(output / f"{name}.{kind}") as partial:
            figure.savefig(partial, format=kind, dpi=300, metadata=metadata)
    write_csv(output / f"{name}.csv", data)
    with atomic_write(output / f"{name}.txt") as partial:
        partial.write_text(" ".join(caption.split()) + "\n")
