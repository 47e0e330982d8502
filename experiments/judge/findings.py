"""A claim is a function, registered by `claim`, from a results folder to a Finding.

`runs` and `analysis` load the rows that it is about; `reductions`, `ranked`, `trend` and the other
comparisons turn these into what was measured in every cell, as bootstrap draws.
"""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.bootstrap import (
    Draws,
    cell_mean,
    constant,
    ratio,
    request_draws,
    spearman,
    table_draws,
)
from experiments.judge.frame import ResultsFolder
from experiments.style import dataset_name, model_name, system_name

Kind = Literal["reduction", "increase", "order", "trend", "at most", "at least", "value"]
Rows = pd.DataFrame
"""Rows of a `run_frame`, or of a CSV of an analysis."""
Names = Sequence[str]
Selector = str | Mapping[str, Any]
"""A system's name, or columns and what they must hold."""
Cell = tuple[Any, ...]
"""Model, dataset, and whatever else a comparison is made by."""
Part = tuple[str, Cell, Draws]
"""What is compared, and its value in one cell."""
LAST = "last"
"""The largest value that a column has."""


class Untestable(Exception):
    """Records do not decide a claim: the cause, and the experiment to run, if not the claim's."""


@dataclass(frozen=True)
class Finding:
    """What the records say of a claim."""

    parts: list[Part]
    rows: Rows  # that were compared
    subject: Selector | None = None  # which of the rows the claim is about; all if None
    metrics: Names = ()
    oracle: float | None = None  # the mean ratio of an oracle's metrics to the others'
    share: bool = False  # whether the parts' mean is judged, not the worst of them
    details: Names = ()  # sentences on where a value comes from

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for _, cell, _ in self.parts))

    @property
    def of_runs(self) -> bool:
        return "table" in self.rows

    @property
    def subjects(self) -> Rows:
        return self.rows if self.subject is None else select(self.rows, self.subject)

    @property
    def comparisons(self) -> dict[str, Draws]:
        """Each comparison over all its cells."""
        by_label = defaultdict(list)
        for label, _, draws in self.parts:
            by_label[label].append(draws)
        return {label: cell_mean(draws) for label, draws in by_label.items()}

    @property
    def paired(self) -> bool:
        """Whether the runs of each model and dataset served the same requests."""
        if not self.of_runs:
            return True
        served = self.rows["table"].map(
            lambda table: str(sorted(zip(table["request"], table["output_tokens"], strict=True)))
        )
        return bool(
            served.groupby([self.rows["model"], self.rows["dataset"]]).nunique().eq(1).all()
        )

    def distinct(self, column: str) -> list[str]:
        """Return the different values of a column, none if there is no such column."""
        return sorted(set(self.rows.get(column, ())))


@dataclass(frozen=True)
class Claim:
    """One claim: what was claimed, and how to measure it."""

    id: str
    kind: Kind
    experiment: str
    section: str
    text: str
    paper: Any
    """The paper's number or limit (a share, seconds, or in `unit`), None for an order, and for a
    trend rises, falls or flat. By model or system where the claim is made of each."""
    measure: Callable[..., Finding]  # of the results folder, and of the model or system if of each
    unit: str = ""  # in which numbers are shown: shares in %, seconds in ms, others as they are
    tolerance: float = 0.0
    weaker: float | None = None  # the wider bound or tolerance at which it holds weaker
    case: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return {"%": 100.0, "ms": 1000.0}.get(self.unit, 1.0)

    def number(self, value: float, digits: int = 3) -> str:
        """Return a value in the claim's unit."""
        return f"{significant(value * self.scale, digits)} {self.unit}".strip()

    def each(self) -> Iterator[Claim]:
        """Yield the claim on each model or system; itself if it is of none."""
        if not isinstance(self.paper, dict):
            yield self
            return
        for case, paper in self.paper.items():
            names = {"model": model_name(case), "system": system_name(case)}
            text = self.text.format(**names, paper=self.number(paper, digits=6))
            name = f"{self.id}-{names['system'].lower()}"
            yield replace(self, id=name, text=text, paper=paper, case=(case,))


def claim(
    kind: Kind, experiment: str, section: str, paper: Any = None, **options: Any
) -> Callable[[Callable[..., Finding]], Claim]:
    """Make a claim of a function, named as the function is; its docstring is the claim's text.

    In a text of several claims {model} or {system} and {paper} are filled in. See Claim for
    `paper` and the options.
    """

    def register(measure: Callable[..., Finding]) -> Claim:
        name, text = measure.__name__.replace("_", "-"), inspect.cleandoc(measure.__doc__ or "")
        return Claim(name, kind, experiment, section, text, paper, measure, **options)

    if kind in ("reduction", "increase", "order"):
        options.setdefault("unit", "%")
    return register


# Rows ---------------------------------------------------------------------------------------------


def runs(results: ResultsFolder, experiment: str, **where: Any) -> Rows:
    """Return an experiment's rows of the `run_frame`; raise Untestable if none is as asked for."""
    return _chosen(results.runs_of(experiment), experiment, where)


def analysis(results: ResultsFolder, experiment: str, name: str, **where: Any) -> Rows:
    """Return rows of a CSV that an analysis left; raise Untestable if none is as asked for."""
    return _chosen(results.table(experiment, name), experiment, where)


def _chosen(rows: Rows, experiment: str, where: Mapping[str, Any]) -> Rows:
    rows = select(rows, where)
    if rows.empty:
        raise Untestable("", experiment)
    return rows


def select(rows: Rows, wanted: Selector) -> Rows:
    """Return the rows whose columns hold what is wanted; none if there is no such column."""
    for name, value in ({"system": wanted} if isinstance(wanted, str) else wanted).items():
        if name not in rows:
            return rows.iloc[:0]
        sought = rows[name].max() if value == LAST else value
        rows = rows.loc[[_same(one, sought) for one in rows[name]]]
    return rows


def _same(value: Any, wanted: Any) -> bool:
    try:
        return abs(float(value) - float(wanted)) < 1e-6
    except (TypeError, ValueError):
        return str(value) == str(wanted)


def _of(rows: Rows, selectors: Sequence[Selector]) -> Rows:
    return pd.concat([select(rows, one) for one in selectors]).drop_duplicates("digest")


def _cells(
    rows: Rows, by: Names = (), compared: Sequence[Selector] = ()
) -> list[tuple[Cell, Rows]]:
    """Return the rows by model and dataset, unless these are compared, and by `by`."""
    keys = {key for one in compared if not isinstance(one, str) for key in one}
    names = [name for name in ("model", "dataset") if name in {*rows.columns} - keys]
    return list(rows.groupby([*names, *by], dropna=False))


# Quantities ---------------------------------------------------------------------------------------


def _measured(
    rows: Rows, metrics: Names, selectors: Sequence[Selector], by: Names = ()
) -> Iterator[tuple[Cell, str, list[Draws]]]:
    """Yield each cell and metric's name with the draws of what the selectors choose."""
    for cell, here in _cells(rows, by, selectors):
        for metric in metrics:
            if metric == "origin":
                draws = _origin_distances(here, cell, selectors)
            else:
                draws = [_draws(here, cell, one, metric) for one in selectors]
            yield cell, quantity_name(metric), draws


def _draws(rows: Rows, cell: Cell, selector: Selector, metric: str) -> Draws:
    chosen = select(rows, selector)
    if len(chosen) != 1:
        count = f"{len(chosen)} records" if len(chosen) else "no record"
        raise Untestable(f"{count} of {selector_name(selector)} on {cell_name(cell)}")
    if "table" in chosen:
        return _run_draws(chosen.iloc[0], metric)
    values = () if isinstance(selector, str) else selector.values()
    return table_draws(chosen.iloc[0], metric, (*cell, *values))


def _run_draws(run: pd.Series[Any], metric: str) -> Draws:
    """Return a metric of one run, its requests resampled; sync_s and sync_share are one number."""
    if metric in ("sync_s", "sync_share"):
        over = run["busy_s"] if metric == "sync_share" else run["iterations"]
        if not over > 0:
            raise Untestable(f"{run['digest'][:12]} does not say how long it was busy")
        return constant(_synchronous_seconds(run) / over)
    try:
        return request_draws(run["table"], metric, run["dataset"])
    except ValueError as error:
        raise Untestable(f"{error} in {run['digest'][:12]}") from error


def _synchronous_seconds(run: pd.Series[Any]) -> float:
    """Return what a system adds to the critical path, expert loads on demand left out."""
    names = ["context_collection", "prefetch_wait"]
    if run["record"]["config"]["system"].get("asynchronous") is False:
        names += ["search", "prefetch_issue"]
    return float(np.nansum([run[f"phase_{name}_s"] for name in names]))


def _origin_distances(rows: Rows, cell: Cell, systems: Sequence[Selector]) -> list[Draws]:
    """Return distances from the origin of TPOT and footprint, each over the largest of them.

    Of a system that ran at several budgets it is that of the nearest.
    """
    points = []
    for system in systems:
        mine = [run for _, run in select(rows, system).iterrows()]
        if not mine:
            raise Untestable(f"no record of {selector_name(system)} on {cell_name(cell)}")
        points.append([(_run_draws(run, "tpot_s"), _footprint(run)) for run in mine])
    seconds, sizes = zip(*itertools.chain(*points), strict=True)
    slowest, largest = np.max(seconds, axis=0), max(sizes)
    return [
        np.min([np.hypot(one / slowest, size / largest) for one, size in mine], axis=0)
        for mine in points
    ]


def _footprint(run: pd.Series[Any]) -> float:
    """Return bytes on the devices: experts in slots at the peak, and what is never offloaded."""
    summary = run["record"]["summary"]
    return float(summary["peak_slot_bytes"] + summary["dense_bytes"])


# Comparisons: each returns what it measured in every cell -----------------------------------------


def reductions(rows: Rows, metrics: Names, systems: Names) -> Finding:
    """By how much the first system lowers each metric, as a share of each other's."""
    oracle = _oracle_ratio(rows, metrics, systems)
    parts = list(_reductions(rows, metrics, systems))
    return Finding(parts, _of(rows, systems), systems[0], metrics, oracle)


def _reductions(rows: Rows, metrics: Names, systems: Names, by: Names = ()) -> Iterator[Part]:
    for cell, metric, (mine, *theirs) in _measured(rows, metrics, systems, by):
        for other, draws in zip(systems[1:], theirs, strict=True):
            yield f"{metric} against {system_name(other)}", cell, 1 - ratio(mine, draws)


def increases(rows: Rows, metric: str, systems: Names) -> Finding:
    """Rises over each other's mean over cells, so that a cell near 0 cannot rule the mean."""
    parts: list[Part] = []
    measured = list(_measured(rows, [metric], systems))
    for number, other in enumerate(systems[1:], 1):
        usual = np.mean([draws[number] for _, _, draws in measured], axis=0)
        for cell, name, draws in measured:
            rise = ratio(draws[0] - draws[number], usual)
            parts.append((f"{name} against {system_name(other)}", cell, rise))
    oracle = _oracle_ratio(rows, [metric], systems)
    return Finding(parts, _of(rows, systems), systems[0], [metric], oracle)


def _oracle_ratio(rows: Rows, metrics: Names, systems: Names) -> float | None:
    try:
        measured = list(_measured(rows, metrics, ["oracle", *systems[1:]]))
    except Untestable:
        return None
    ratios = [oracle[0] / one[0] for _, _, (oracle, *rest) in measured for one in rest]
    return float(np.mean(ratios))


def smaller(here: Finding, there: Finding) -> Finding:
    """By how much reductions are smaller here than there, where both were measured."""
    theirs = {(label, cell): draws for label, cell, draws in there.parts}
    parts = [
        (f"reduction of {label}", cell, theirs[label, cell] - draws)
        for label, cell, draws in here.parts
        if (label, cell) in theirs
    ]
    return Finding(parts, pd.concat([here.rows, there.rows]), here.subject, here.metrics)


def lowest(rows: Rows, metrics: Names, systems: Sequence[Selector]) -> Finding:
    """Margins by which the first system is below each other."""
    name, *names = map(selector_name, systems)
    parts = [
        (f"{metric}: {name} below {other}", cell, _margin(mine, draws))
        for cell, metric, (mine, *theirs) in _measured(rows, metrics, systems)
        for other, draws in zip(names, theirs, strict=True)
    ]
    return Finding(parts, _of(rows, systems), systems[0], metrics)


def ranked(rows: Rows, metric: str, ranking: Sequence[Selector], by: Names = ()) -> Finding:
    """Margins by which each of a ranking, from least to most, is below the next."""
    names = list(itertools.pairwise(map(selector_name, ranking)))
    parts = [
        (f"{name}: {low} below {high}", cell, _margin(*pair))
        for cell, name, draws in _measured(rows, [metric], ranking, by)
        for (low, high), pair in zip(names, itertools.pairwise(draws), strict=True)
    ]
    return Finding(parts, _of(rows, ranking), metrics=[metric])


def _margin(low: Draws, high: Draws) -> Draws:
    """Return by how much `high` exceeds `low`, as a share of their mean; 0 where both are 0."""
    total = low + high
    return np.divide(2 * (high - low), total, out=np.zeros_like(total), where=total != 0)


def share_lowest(rows: Rows, metrics: Names, systems: Names, by: Names = ()) -> Finding:
    """The share of cells and metrics in which the first system is the lowest."""
    parts = [
        (f"{metric} lowest", cell, (mine < np.min(theirs, axis=0)).astype(float))
        for cell, metric, (mine, *theirs) in _measured(rows, metrics, systems, by)
    ]
    return Finding(parts, _of(rows, systems), systems[0], metrics, share=True)


def changes(here: Rows, there: Rows, metric: str, systems: Names) -> Finding:
    """How far a metric of each system is from that of another experiment."""
    before = {cell: draws for cell, _, draws in _measured(there, [metric], systems)}
    parts = [
        (f"{name} of {system_name(system)}", cell, np.abs(mine - theirs))
        for cell, name, draws in _measured(here, [metric], systems)
        for system, mine, theirs in zip(systems, draws, before[cell], strict=True)
    ]
    rows = pd.concat([_of(one, systems) for one in (here, there)])
    return Finding(parts, rows, systems[0], [metric])


def trend(rows: Rows, x: str, value: str, direction: str, by: Names = ()) -> Finding:
    """Rank correlations of an analysis's value with x."""
    # The points of a curve are of the same requests: drawn one by one they would lose their order.
    curves = {
        (quantity_name(value), cell): list(zip(here[x], map(constant, here[value]), strict=True))
        for cell, here in _cells(rows, by)
    }
    return Finding(_correlations(curves, x, direction), rows)


def trend_of_reductions(
    rows: Rows, x: str, metrics: Names, systems: Names, direction: str
) -> Finding:
    """Rank correlations of the first system's reductions with a setting."""
    curves = defaultdict(list)
    for label, (*cell, at), draws in _reductions(rows, metrics, systems, [x]):
        curves[f"reduction of {label}", tuple(cell)].append((at, draws))
    parts = _correlations(curves, x, direction)
    return Finding(parts, _of(rows, systems), systems[0], metrics)


def _correlations(
    curves: Mapping[tuple[str, Cell], list[tuple[float, Draws]]], x: str, direction: str
) -> list[Part]:
    sign, parts = (1.0 if direction == "rises" else -1.0), []
    for (what, cell), points in curves.items():
        if len(points) < 3:
            raise Untestable(f"{len(points)} values of {x} make no trend")
        label = f"{what} {direction} with {quantity_name(x)}"
        parts.append((label, cell, sign * spearman(*zip(*points, strict=True))))
    return parts


def plateau(rows: Rows, x: str, value: str, after: float, by: Names = ()) -> Finding:
    """Slopes of an analysis's value up to a point, and beyond it."""
    parts: list[Part] = []
    what = f"slope of {quantity_name(value)}"
    for cell, here in _cells(rows, by):
        points = [row for _, row in here.sort_values(x).iterrows()]
        at = [row[x] for row in points]
        if len(at) < 3 or not at[0] < after < at[-1]:
            raise Untestable(f"{len(at)} values of {x} do not reach from below {after:g} beyond")
        bend = min(range(1, len(at) - 1), key=lambda i: abs(at[i] - after))
        y = [table_draws(row, value, (*cell, row[x])) for row in points]
        before = (y[bend] - y[0]) / (at[bend] - at[0])
        beyond = (y[-1] - y[bend]) / (at[-1] - at[bend])
        parts.append((f"{what} up to {at[bend]:g}", cell, before))
        parts.append((f"{what} beyond {at[bend]:g}", cell, beyond))
    return Finding(parts, rows)


def values(rows: Rows, metric: str, system: str | None = None, by: Names = ()) -> Finding:
    """A metric of a system, or a column of an analysis."""
    measured = _measured(rows, [metric], [system or {}], by)
    parts = [(name, cell, draws) for cell, name, (draws,) in measured]
    if system:
        return Finding(parts, _of(rows, [system]), system, [metric])
    numbers = rows.select_dtypes("number").to_dict("records")
    computed = (", ".join(f"{name} = {one:.4g}" for name, one in row.items()) for row in numbers)
    return Finding(parts, rows, details=[f"It follows from {one}." for one in computed])


def best_setting(rows: Rows, x: str, metric: str, system: str) -> Finding:
    """The setting at which a system's metric is least."""
    parts: list[Part] = []
    details, what, setting = [], quantity_name(metric), quantity_name(x)
    for cell, here in _cells(rows):
        mine = select(here, system).sort_values(x)
        settings = mine[x].to_numpy(float)
        if not 2 <= len(set(settings)) == len(mine):
            count = f"{len(mine)} runs at {len(set(settings))} values of {x}"
            raise Untestable(f"{count} on {cell_name(cell)}")
        draws = np.stack([_run_draws(run, metric) for _, run in mine.iterrows()])
        parts.append((f"{setting} with the lowest {what}", cell, settings[draws.argmin(axis=0)]))
        points = zip(settings, 1e3 * draws[:, 0], strict=True)
        curve = ", ".join(f"{at:g}: {one:.4g} ms" for at, one in points)
        details.append(f"{what} by {setting} ({cell_name(cell)}): {curve}.")
    return Finding(parts, _of(rows, [system]), system, [metric], details=details)


# Names --------------------------------------------------------------------------------------------

_NAMES = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2el_s": "end-to-end latency",
    "hit_rate": "expert hit rate",
    "sync_s": "synchronous overhead an iteration",
    "sync_share": "synchronous share of the time served",
    "origin": "distance from the origin",
    "nats": "entropy (nats)",
    "pearson": "Pearson correlation",
    "score": "similarity score",
    "active_b": "active parameters (10^9)",
    "total_b": "parameters (10^9)",
    "inactive_gb": "inactive parameters (GB)",
    "inactive_share": "inactive share",
    "maps_mb": "expert maps (MB)",
    "total_mb": "maps and embeddings (MB)",
    "memory_budget_gb": "expert cache (GB)",
    "prefetch_distance": "prefetch distance",
    "distance": "prefetch distance",
    "capacity": "store capacity",
}
_OPTIONS = {
    "search=both": "T+S",
    "search=trajectory": "T",
    "search=semantic": "S",
    "selection=delta": "δ",
    "selection=top_k": "",
    "eviction=lru": "LRU caching",
    "eviction=lfu": "LFU caching",
    "eviction=finemoe": "its own caching",
}


def quantity_name(quantity: str) -> str:
    """Return how reports call a metric, such as `e2el_s@0.9`, a column or a setting."""
    name, _, level = quantity.partition("@")
    return _NAMES.get(name, name) + (f", p{float(level) * 100:g}" if level else "")


def selector_name(selector: Selector) -> str:
    """Return how reports call a system, with the options that were asked for."""
    if isinstance(selector, str):
        return system_name(selector)
    if "system" not in selector:
        return ", ".join(map(str, selector.values())) or "that kind"
    options = [f"{n}={v}" for n, v in selector.items() if n != "system"]
    known = [_OPTIONS.get(option, option) for option in options]
    name = system_name(selector["system"])
    return f"{name} ({', '.join(filter(None, known))})" if any(known) else name


def cell_name(cell: Cell) -> str:
    """Return how reports call a cell."""
    model, *others = [f"{one:g}" if isinstance(one, float) else str(one) for one in cell]
    return ", ".join([model_name(model), *map(dataset_name, others)])


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, never with an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:.{min(decimals, 3)}f}"
    return text.rstrip("0").rstrip(".") if digits > 3 and "." in text else text
