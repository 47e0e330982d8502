"""Comparisons turn rows into a Finding: what was measured in every cell, as bootstrap draws."""

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd

from experiments import bootstrap
from experiments.bootstrap import Draws, constant, ratio
from experiments.style import dataset_name, model_name, system_name

Rows = pd.DataFrame  # rows of a `run_frame`, or of a CSV of an analysis
Names = Sequence[str]
Selector = str | Mapping[str, Any]  # a system's name, or columns and what they must hold
Cell = tuple[Any, ...]  # model, dataset, and whatever else a comparison is made by
Part = tuple[str, Cell, Draws]  # what is compared, and its value in one cell
LAST = "last"  # the largest value that a column has


class Untestable(Exception):
    """Records do not decide a claim: the cause, and the experiment to run, if not the claim's."""


@dataclass(frozen=True)
class Finding:
    """What the records say of a claim."""

    parts: list[Part]
    rows: Rows  # that were compared
    metrics: Names
    subject: Selector | None = None  # which of the rows the claim is about; all if None
    oracle: float | None = None  # the mean ratio of an oracle's metrics to the others'
    share: bool = False  # whether the parts' mean is judged, not the worst of them
    details: Names = ()  # sentences on where a value comes from

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for _, cell, _ in self.parts))

    def means(self) -> dict[str, Draws]:
        """Return each comparison over all its cells."""
        by_label = defaultdict(list)
        for label, _, draws in self.parts:
            by_label[label].append(draws)
        return {label: bootstrap.cell_mean(each) for label, each in by_label.items()}

    @property
    def of_runs(self) -> bool:
        return "table" in self.rows

    @property
    def subjects(self) -> Rows:
        return select(self.rows, self.subject or {})

    @property
    def paired(self) -> bool:
        """Whether the runs of each model and dataset served the same requests."""
        if not self.of_runs:
            return True
        columns = ["request", "output_tokens"]
        served = [str(sorted(table[columns].to_numpy().tolist())) for table in self.rows["table"]]
        groups = self.rows.assign(served=served).groupby(["model", "dataset"])
        return bool(groups["served"].nunique().eq(1).all())

    def distinct(self, column: str) -> list[str]:
        """Return the different values of a column, none if there is no such column."""
        return sorted(set(self.rows.get(column, ())))


@dataclass(frozen=True)
class Claim:
    """One claim: what was claimed, and how to measure it."""

    id: str
    kind: str  # reduction, increase, order, trend, at most, at least or value
    experiment: str
    section: str
    text: str
    # Number or limit (a share, seconds, or in `unit`), None for an order; a trend rises, falls or
    # is flat. By model or system where the claim is made of each.
    paper: Any
    measure: Callable[..., Finding]  # of the rows, and of the model or system if of each
    unit: str = ""  # in which numbers are shown: shares in %, seconds in ms, others as they are
    tolerance: float = 0.0
    weaker: float | None = None  # the wider bound or tolerance at which it holds weaker
    against: str = ""  # another experiment, whose rows `measure` takes after the claim's own

    @property
    def scale(self) -> float:
        return {"%": 100.0, "ms": 1000.0}.get(self.unit, 1.0)

    def number(self, value: float, digits: int = 3) -> str:
        return f"{significant(value * self.scale, digits)} {self.unit}".strip()

    def each(self) -> Iterator[Self]:
        """Yield the claim on each model or system; itself if it is of none."""
        if not isinstance(self.paper, dict):
            yield self
            return
        for case, paper in self.paper.items():
            names = {"model": model_name(case), "system": system_name(case)}
            text = self.text.format(**names, paper=self.number(paper, digits=6))
            name = f"{self.id}-{names['system'].lower()}"
            measure: Any = lambda *rows, case=case: self.measure(*rows, case)  # noqa: E731
            yield replace(self, id=name, text=text, paper=paper, measure=measure)


def claim(
    kind: str, experiment: str, section: str, paper: Any = None, **options: Any
) -> Callable[[Callable[..., Finding]], Claim]:
    """Make a claim of a function, named as the function is; its docstring is the claim's text.

    It takes the experiment's runs, as `run_frame` gives them, or the rows that its analysis left.
    {model} or {system} and {paper} are filled in; see Claim for `paper` and the options.
    """

    def register(measure: Callable[..., Finding]) -> Claim:
        name, text = measure.__name__.replace("_", "-"), inspect.cleandoc(measure.__doc__ or "")
        return Claim(name, kind, experiment, section, text, paper, measure, **options)

    if kind in ("reduction", "increase", "order"):
        options.setdefault("unit", "%")
    return register


def select(rows: Rows, wanted: Selector) -> Rows:
    """Return the rows whose columns hold what is wanted; none if there is no such column."""
    for name, value in ({"system": wanted} if isinstance(wanted, str) else wanted).items():
        if name not in rows:
            return rows.iloc[:0]
        sought = rows[name].max() if value == LAST else value
        numbers = pd.to_numeric(rows[name], errors="coerce").astype(float)
        near = (numbers - pd.to_numeric(sought, errors="coerce")).abs() < 1e-6
        rows = rows[near | (rows[name].astype(str) == str(sought))]
    return rows


def _of(rows: Rows, selectors: Sequence[Selector]) -> Rows:
    return pd.concat([select(rows, one) for one in selectors]).drop_duplicates("digest")


def _measured(
    rows: Rows, metrics: Names, selectors: Sequence[Selector], by: Names = ()
) -> tuple[list[tuple[Cell, str]], Draws]:
    """Return cells with each metric, and draws: (these, selectors, 1 + RESAMPLES)."""
    compared = {key for one in selectors if not isinstance(one, str) for key in one}
    names = [name for name in ("model", "dataset") if name in {*rows.columns} - compared]
    if rows.empty:
        raise Untestable("")
    found = {}
    for cell, here in rows.groupby([*names, *by], dropna=False):
        chosen = [(select(here, one), one, cell) for one in selectors]
        for metric in metrics:
            axes = ("tpot_s", "footprint") if metric == "origin" else (metric,)
            drawn = [np.stack([_draws(*one, name) for one in chosen]) for name in axes]
            if metric == "origin":
                drawn = [np.hypot(*(one / one.max(axis=0) for one in drawn))]
            found[cell, metric] = drawn[0]
    return list(found), np.stack(list(found.values()))


def _draws(chosen: Rows, selector: Selector, cell: Cell, metric: str) -> Draws:
    if len(chosen) != 1:
        count = f"{len(chosen)} records" if len(chosen) else "no record"
        raise Untestable(f"{count} of {selector_name(selector)} on {cell_name(cell)}")
    if "table" in chosen:
        return _run_draws(chosen.iloc[0], metric)
    values = () if isinstance(selector, str) else selector.values()
    return bootstrap.table_draws(chosen.iloc[0], metric, (*cell, *values))


def _run_draws(run: Any, metric: str) -> Draws:
    """Return a metric of one run, its requests resampled; footprint and sync_* are constant."""
    summary = run["record"]["summary"]
    if metric == "footprint":
        return constant(summary["peak_slot_bytes"] + summary["dense_bytes"])
    over = {"sync_s": run["iterations"], "sync_share": run["busy_s"]}.get(metric)
    if over is None:
        try:
            return bootstrap.request_draws(run["table"], metric, run["dataset"])
        except ValueError as error:
            raise Untestable(f"{error} in {run['digest'][:12]}") from error
    if not over > 0:
        raise Untestable(f"{run['digest'][:12]} does not say how long it was busy")
    names = ["context_collection", "prefetch_wait"]
    if run["record"]["config"]["system"].get("asynchronous") is False:
        names += ["search", "prefetch_issue"]
    return constant(float(np.nansum([run[f"phase_{name}_s"] for name in names])) / over)


def _parts(keys: list[tuple[Cell, str]], draws: Draws, names: Names = ("",)) -> list[Part]:
    """Name comparisons, shape (cells and metrics, names, 1 + RESAMPLES)."""
    return [
        (quantity_name(metric) + name, cell, one)
        for (cell, metric), compared in zip(keys, draws, strict=True)
        for name, one in zip(names, compared, strict=True)
    ]


def reductions(rows: Rows, metrics: Names, systems: Names, by: Names = ()) -> Finding:
    """By how much the first system lowers each metric, as a share of each other's."""
    keys, draws = _measured(rows, metrics, systems, by)
    lowered = 1 - ratio(draws[:, :1], draws[:, 1:])
    parts = _parts(keys, lowered, [f" against {system_name(other)}" for other in systems[1:]])
    return Finding(parts, _of(rows, systems), metrics, systems[0], _oracle(rows, metrics, systems))


def increases(rows: Rows, metric: str, systems: Names) -> Finding:
    """Rises over each other's mean over cells, so that a cell near 0 cannot rule the mean."""
    keys, draws = _measured(rows, [metric], systems)
    risen = ratio(draws[:, :1] - draws[:, 1:], draws[:, 1:].mean(axis=0))
    parts = _parts(keys, risen, [f" against {system_name(other)}" for other in systems[1:]])
    oracle = _oracle(rows, [metric], systems)
    return Finding(parts, _of(rows, systems), [metric], systems[0], oracle)


def _oracle(rows: Rows, metrics: Names, systems: Names) -> float | None:
    try:
        _, draws = _measured(rows, metrics, ["oracle", *systems[1:]])
    except Untestable:
        return None
    return float(ratio(draws[:, :1, 0], draws[:, 1:, 0]).mean())


def smaller(here: Finding, there: Finding) -> Finding:
    """By how much reductions are smaller here than there, where both were measured."""
    theirs = {(label, cell): draws for label, cell, draws in there.parts}
    parts = [
        (f"reduction of {label}", cell, theirs[label, cell] - draws)
        for label, cell, draws in here.parts
        if (label, cell) in theirs
    ]
    return Finding(parts, pd.concat([here.rows, there.rows]), here.metrics, here.subject)


def lowest(rows: Rows, metrics: Names, systems: Sequence[Selector]) -> Finding:
    """Margins by which the first system is below each other."""
    name, *others = map(selector_name, systems)
    keys, draws = _measured(rows, metrics, systems)
    margins = _margin(draws[:, :1], draws[:, 1:])
    parts = _parts(keys, margins, [f": {name} below {other}" for other in others])
    return Finding(parts, _of(rows, systems), metrics, systems[0])


def ranked(rows: Rows, metric: str, ranking: Sequence[Selector], by: Names = ()) -> Finding:
    """Margins by which each of a ranking, from least to most, is below the next."""
    pairs = itertools.pairwise(map(selector_name, ranking))
    keys, draws = _measured(rows, [metric], ranking, by)
    margins = _margin(draws[:, :-1], draws[:, 1:])
    parts = _parts(keys, margins, [f": {low} below {high}" for low, high in pairs])
    return Finding(parts, _of(rows, ranking), [metric])


def _margin(low: Draws, high: Draws) -> Draws:
    """Return by how much `high` exceeds `low`, as a share of their mean; 0 where both are 0."""
    total = low + high
    return np.divide(2 * (high - low), total, out=np.zeros_like(total), where=total != 0)


def share_lowest(rows: Rows, metrics: Names, systems: Names, by: Names = ()) -> Finding:
    """The share of cells and metrics in which the first system is the lowest."""
    keys, draws = _measured(rows, metrics, systems, by)
    best = (draws[:, :1] < draws[:, 1:].min(axis=1, keepdims=True)).astype(float)
    parts = _parts(keys, best, [" lowest"])
    return Finding(parts, _of(rows, systems), metrics, systems[0], share=True)


def changes(here: Rows, there: Rows, metric: str, systems: Names) -> Finding:
    """How far a metric of each system is from that of another experiment."""
    keys, draws = _measured(here, [metric], systems)
    before = dict(zip(*_measured(there, [metric], systems), strict=True))
    moved = np.abs(draws - np.stack([before[key] for key in keys]))
    parts = _parts(keys, moved, [f" of {system_name(system)}" for system in systems])
    rows = pd.concat([_of(one, systems) for one in (here, there)])
    return Finding(parts, rows, [metric], systems[0])


def values(rows: Rows, metric: str, system: str | None = None, by: Names = ()) -> Finding:
    """A metric of a system, or a column of an analysis."""
    parts = _parts(*_measured(rows, [metric], [system or {}], by))
    if system:
        return Finding(parts, _of(rows, [system]), [metric], system)
    numbers = rows.select_dtypes("number").to_dict("records")
    computed = (", ".join(f"{name} = {one:.4g}" for name, one in row.items()) for row in numbers)
    return Finding(parts, rows, [metric], details=[f"It follows from {one}." for one in computed])


def _curves(finding: Finding, x: str, points: int = 3) -> Iterator[tuple[str, Cell, Draws, Draws]]:
    """Yield what is measured, its cell, settings, and draws, shape (settings, 1 + RESAMPLES)."""
    curves = defaultdict(list)
    for label, cell, draws in finding.parts:
        curves[label, cell[:-1]].append((cell[-1], draws))
    for (label, cell), curve in curves.items():
        if len(curve) < points:
            raise Untestable(f"{len(curve)} values of {x} make no curve")
        settings = np.array([float(at) for at, _ in curve])
        yield label, cell, settings, np.stack([draws for _, draws in curve])


def trend(finding: Finding, x: str, direction: str, what: str = "") -> Finding:
    """Rank correlations with x, by which something was measured, of `what` it was."""
    sign, parts = (1.0 if direction == "rises" else -1.0), []
    for label, cell, at, draws in _curves(finding, x):
        # Points of an analysis are of the same requests: drawn one by one they lose their order.
        drawn = draws if finding.of_runs else np.repeat(draws[:, :1], draws.shape[1], axis=1)
        name = f"{what}{label} {direction} with {quantity_name(x)}"
        parts.append((name, cell, sign * bootstrap.spearman([*at], [*drawn])))
    return replace(finding, parts=parts, oracle=None)


def plateau(finding: Finding, x: str, after: float) -> Finding:
    """Slopes over x, by which something was measured, up to a point and beyond it."""
    parts = []
    for label, cell, at, draws in _curves(finding, x):
        if not at[0] < after < at[-1]:
            raise Untestable(f"values of {x} do not reach from below {after:g} beyond")
        bend = 1 + int(np.abs(at[1:-1] - after).argmin())
        for where, (start, end) in (("up to", (0, bend)), ("beyond", (bend, -1))):
            slope = (draws[end] - draws[start]) / (at[end] - at[start])
            parts.append((f"slope of {label} {where} {at[bend]:g}", cell, slope))
    return replace(finding, parts=parts)


def best_setting(finding: Finding, x: str) -> Finding:
    """The setting x at which something measured by it is least."""
    setting, parts, details = quantity_name(x), [], []
    for label, cell, at, draws in _curves(finding, x, points=2):
        parts.append((f"{setting} with the lowest {label}", cell, at[draws.argmin(axis=0)]))
        points = zip(at, 1e3 * draws[:, 0], strict=True)
        curve = ", ".join(f"{one:g}: {ms:.4g} ms" for one, ms in points)
        details.append(f"{label} by {setting} ({cell_name(cell)}): {curve}.")
    return replace(finding, parts=parts, details=details)


_NAMES = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2el_s": "end-to-end latency",
    "service_s": "service time",
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
    "distance": "prefetch distance",
    "capacity": "store capacity",
}
_OPTIONS = {
    "search=both": "T+S",
    "search=trajectory": "T",
    "selection=delta": "δ",
    "selection=top_k": "",
    "eviction=lru": "LRU caching",
    "eviction=lfu": "LFU caching",
    "eviction=finemoe": "its own caching",
    "predictor=speculation": "speculation",
    "predictor=hit_count": "hit count",
}


def quantity_name(quantity: str) -> str:
    """Return how reports call a metric, such as `e2el_s@0.9`, a column or a setting."""
    name, _, level = quantity.partition("@")
    return _NAMES.get(name, name.replace("_", " ")) + (
        f", p{float(level) * 100:g}" if level else ""
    )


def selector_name(selector: Selector) -> str:
    """Return how reports call a system, with the options that were asked for."""
    if isinstance(selector, str):
        return system_name(selector)
    if "system" not in selector:
        return ", ".join(map(str, selector.values())) or "that kind"
    options = [f"{n}={v}" for n, v in selector.items() if n != "system"]
    known = ", ".join(filter(None, (_OPTIONS.get(option, option) for option in options)))
    return system_name(selector["system"]) + (f" ({known})" if known else "")


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
