"""What a results folder says of a claim, cell by cell, as bootstrap draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from experiments.figures.style import dataset_name, model_name, system_name
from experiments.judge.frame import ResultsFolder, Table

Kind = Literal["reduction", "increase", "order", "trend", "bound", "value"]
Selector = str | Mapping[str, Any]
"""A system's name, or columns and what they must hold, `system` among them."""
Cell = tuple[Any, ...]
"""Model, dataset, and whatever else `by` names."""
Cells = Mapping[Cell, pd.DataFrame]
"""The runs of each cell."""
Run = Mapping[Any, Any]
"""A row of a `run_frame`."""
LAST = "last"
"""In `where`: the largest value that the table has."""


class Untestable(Exception):
    """A claim that the records at hand cannot decide; the text says why and what would."""


def lacking(claim: Claim, cause: str = "") -> Untestable:
    """Return what to raise where an experiment's records lack something for a claim."""
    remedy = f"run python -m experiments.reproduce {claim.experiment}"
    return Untestable(f"{cause}: {remedy}" if cause else remedy)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper; experiments/judge/claims.yaml explains the fields."""

    id: str
    section: str
    experiment: str
    text: str
    kind: Kind
    metric: tuple[str, ...] = ()
    subject: Selector = "finemoe"
    against: tuple[Selector, ...] = ()
    ranking: tuple[Any, ...] = ()
    better: Literal["lower", "higher"] = "lower"
    versus: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    by: tuple[str, ...] = ()
    x: str = ""
    direction: Literal["", "rises", "falls"] = ""
    flat_after: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    weakly: float | None = None
    aggregate: Literal["worst", "share"] = "worst"
    paper: float | None = None
    tolerance: float = 0.0
    weaker_tolerance: float | None = None
    unit: str = ""
    table: str = ""
    value: str = ""
    key: str = ""
    derive: str = ""

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """Return every run that the claim compares; the subject comes first, if there is one."""
        return self.ranking or (self.subject, *self.against)

    @property
    def shown_unit(self) -> str:
        """The unit in which its values, fractions or seconds, are shown."""
        return self.unit or ("%" if self.kind in ("reduction", "increase", "order") else "")

    @property
    def scale(self) -> float:
        """What values are multiplied by for that unit."""
        return {"%": 100.0, "ms": 1000.0}.get(self.shown_unit, 1.0)


@dataclass(frozen=True)
class Part:
    """One comparison, or one value, in one cell."""

    label: str
    cell: Cell
    draws: Draws


@dataclass(frozen=True)
class Finding:
    """What was measured of a claim."""

    parts: tuple[Part, ...]
    draws: Draws
    """The number to judge, over all parts; for an order the least margin."""
    label: str
    """What that number is."""
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The rows of the `run_frame` that were compared."""
    table: Table | None = None

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(part.cell for part in self.parts))

    @property
    def paired(self) -> bool:
        """Whether the runs of each model and dataset served the same requests."""
        served: dict[Cell, set[tuple[Any, ...]]] = {}
        for run in self.runs.to_dict("records"):
            table = run["table"].sort_values("request")
            lengths = zip(table["request"], table["output_tokens"], strict=True)
            served.setdefault((run["model"], run["dataset"]), set()).add(tuple(lengths))
        return all(len(one) == 1 for one in served.values())


def comparisons(parts: Sequence[Part]) -> dict[str, Draws]:
    """Return each comparison over all its cells."""
    by_label: dict[str, list[Draws]] = {}
    for part in parts:
        by_label.setdefault(part.label, []).append(part.draws)
    return {label: cell_mean(draws) for label, draws in by_label.items()}


def measure(claim: Claim, results: ResultsFolder) -> Finding:
    """Return what the records say about a claim; raise Untestable if they say nothing."""
    table, runs = None, pd.DataFrame()
    if claim.table:
        table = results.table(claim.experiment, claim.table)
        if table is None:
            raise lacking(claim)
        parts = tuple(_of_table(claim, table.rows))
    else:
        experiments = filter(None, (claim.experiment, claim.versus))
        cells = [_cells(claim, results.runs_of(one)) for one in experiments]
        parts = tuple(_RUN_PARTS[claim.kind](claim, *cells))
        every = [pd.concat(some.values()) for some in cells]
        chosen = [select(runs, one) for runs in every for one in claim.selectors]
        runs = pd.concat(chosen).drop_duplicates("digest")
    if not parts:
        raise lacking(claim, "nothing to compare")
    return Finding(parts, *summarise(claim, parts), runs, table)


def select(rows: pd.DataFrame, wanted: Selector) -> pd.DataFrame:
    """Return the rows whose columns hold what is wanted; none if there is no such column."""
    for name, value in ({"system": wanted} if isinstance(wanted, str) else wanted).items():
        if name not in rows:
            return rows.iloc[:0]
        sought = rows[name].max() if value == LAST else value
        rows = rows.loc[[_same(one, sought) for one in rows[name]]]
    return rows


def _same(found: Any, wanted: Any) -> bool:
    try:
        return abs(float(found) - float(wanted)) < 1e-6
    except (TypeError, ValueError):
        return str(found) == str(wanted)


# Run records --------------------------------------------------------------------------------------


def _cells(claim: Claim, runs: pd.DataFrame) -> Cells:
    wanted = select(runs, claim.where)
    if wanted.empty:
        raise lacking(claim)
    groups = wanted.groupby(["model", "dataset", *claim.by], dropna=False)
    return dict(sorted(groups, key=lambda item: str(item[0])))


def _several(claim: Claim, cells: Cells, cell: Cell, selector: Selector) -> Sequence[Run]:
    found = select(cells[cell], selector) if cell in cells else pd.DataFrame()
    if found.empty:
        raise lacking(claim, f"no record of {selector_name(selector)} on {cell_name(cell)}")
    return found.to_dict("records")


def _draws(claim: Claim, cells: Cells, cell: Cell, selector: Selector, metric: str) -> Draws:
    """Return a metric of the one run that a selector finds in a cell."""
    found = _several(claim, cells, cell, selector)
    if len(found) > 1:
        raise lacking(
            claim,
            f"{len(found)} records of {selector_name(selector)} on {cell_name(cell)}, where "
            "the claim is about one; narrow the experiment",
        )
    return run_draws(found[0], metric)


def run_draws(run: Run, metric: str) -> Draws:
    """Return a metric of one run, its requests resampled; sync_s and sync_share are one number."""
    if metric in ("sync_s", "sync_share"):
        over = run["busy_s"] if metric == "sync_share" else run["iterations"]
        if not over > 0:
            raise Untestable(f"{run['digest'][:12]} does not say how long it was busy: "
                             "run it again")  # fmt: skip
        return constant(synchronous_seconds(run) / over)
    try:
        return request_draws(run["table"], metric, run["dataset"])
    except ValueError as error:
        raise Untestable(f"{error} in {run['digest'][:12]}") from error


def synchronous_seconds(run: Run) -> float:
    """Return what a system adds to the critical path, expert loads on demand left out."""
    names = ["context_collection", "prefetch_wait"]
    if run["record"]["config"]["system"].get("asynchronous") is False:
        names += ["search", "prefetch_issue"]
    return float(np.nansum([run[f"phase_{name}_s"] for name in names]))


def _gains(claim: Claim, cells: Cells) -> Iterator[Part]:
    """Yield by how much the subject lowers each metric, as a share of the other's."""
    for cell, metric in itertools.product(cells, claim.metric):
        subject = _draws(claim, cells, cell, claim.subject, metric)
        for other in claim.against:
            label = f"{quantity_name(metric)} against {selector_name(other)}"
            yield Part(label, cell, 1 - ratio(subject, _draws(claim, cells, cell, other, metric)))


def _increase(claim: Claim, cells: Cells) -> Iterator[Part]:
    """Yield rises over the other's mean over cells, so that a cell near 0 cannot rule the mean."""
    for metric, other in itertools.product(claim.metric, claim.against):
        mine, base = (
            {cell: _draws(claim, cells, cell, one, metric) for cell in cells}
            for one in (claim.subject, other)
        )
        usual = np.mean(list(base.values()), axis=0)
        label = f"{quantity_name(metric)} against {selector_name(other)}"
        for cell in cells:
            yield Part(label, cell, ratio(mine[cell] - base[cell], usual))


def _order(claim: Claim, cells: Cells, others: Cells | None = None) -> Iterator[Part]:
    if others is not None:
        theirs = {(part.label, part.cell): part.draws for part in _gains(claim, others)}
        for part in _gains(claim, cells):
            if (part.label, part.cell) in theirs:
                difference = theirs[part.label, part.cell] - part.draws
                yield Part(f"reduction of {part.label}", part.cell, difference)
        return
    for cell, metric in itertools.product(cells, claim.metric):
        if metric == "origin":
            values = _origins(claim, cells, cell)
        else:
            draws = [_draws(claim, cells, cell, one, metric) for one in claim.selectors]
            values = list(zip(map(selector_name, claim.selectors), draws, strict=True))
        yield from _margins(claim, cell, values, quantity_name(metric))


def _origins(claim: Claim, cells: Cells, cell: Cell) -> list[tuple[str, Draws]]:
    """Return distances from the origin; of a system that ran at several budgets, the nearest."""
    runs = {selector_name(one): _several(claim, cells, cell, one) for one in claim.selectors}
    points = {
        name: [(run_draws(run, "tpot_s"), footprint(run)) for run in some]
        for name, some in runs.items()
    }
    every = [point for some in points.values() for point in some]
    slowest = np.max([time for time, _ in every], axis=0)
    largest = max(size for _, size in every)
    return [
        (name, np.min([np.hypot(time / slowest, size / largest) for time, size in some], axis=0))
        for name, some in points.items()
    ]


def footprint(run: Run) -> float:
    """Return bytes on the devices: experts in slots at the peak, and what is never offloaded."""
    summary = run["record"]["summary"]
    return float(summary["peak_slot_bytes"] + summary["dense_bytes"])


def _margins(
    claim: Claim, cell: Cell, values: Sequence[tuple[str, Draws]], what: str
) -> Iterator[Part]:
    """Compare neighbours of a ranking, or the first with all others."""
    if claim.ranking:
        pairs = list(itertools.pairwise(values))
    else:
        first, *others = values
        pairs = [(first, one) if claim.better == "lower" else (one, first) for one in others]
    for (low_name, low), (high_name, high) in pairs:
        yield Part(f"{what}: {low_name} below {high_name}", cell, margin(low, high))


def margin(low: Draws, high: Draws) -> Draws:
    """Return by how much `high` exceeds `low`, as a share of their mean; 0 where both are 0."""
    total = low + high
    return np.divide(2 * (high - low), total, out=np.zeros_like(total), where=total != 0)


def _trend(claim: Claim, cells: Cells) -> Iterator[Part]:
    for cell, runs in cells.items():
        settings = sorted(map(float, runs[claim.x].unique()))
        curves: dict[str, list[Draws]] = {}
        for at in settings:
            for part in _gains(claim, {cell: select(runs, {claim.x: at})}):
                curves.setdefault(part.label, []).append(part.draws)
        for label, curve in curves.items():
            yield from _shape(claim, f"reduction of {label}", cell, settings, curve)


def _bound(claim: Claim, cells: Cells, others: Cells | None = None) -> Iterator[Part]:
    for cell, metric in itertools.product(cells, claim.metric):
        what = quantity_name(metric)
        subject, *against = (_draws(claim, cells, cell, one, metric) for one in claim.selectors)
        if others is not None:
            for one, mine in zip(claim.selectors, (subject, *against), strict=True):
                change = np.abs(mine - _draws(claim, others, cell, one, metric))
                yield Part(f"{what} of {selector_name(one)}", cell, change)
        elif claim.aggregate == "share":
            yield Part(f"{what} lowest", cell, (subject < np.min(against, axis=0)).astype(float))
        else:
            yield Part(what, cell, subject)


def _best_setting(claim: Claim, cells: Cells) -> Iterator[Part]:
    (metric,) = claim.metric
    for cell in cells:
        runs = sorted(_several(claim, cells, cell, claim.subject), key=lambda run: run[claim.x])
        settings = np.unique([float(run[claim.x]) for run in runs])
        if len(settings) < 2 or len(settings) != len(runs):
            cause = f"{len(runs)} runs at {len(settings)} values of {claim.x} on {cell_name(cell)}"
            raise lacking(claim, cause)
        least = np.argmin([run_draws(run, metric) for run in runs], axis=0)
        what = f"{quantity_name(claim.x)} with the lowest {quantity_name(metric)}"
        yield Part(what, cell, settings[least])


_RUN_PARTS = {
    "reduction": _gains,
    "increase": _increase,
    "order": _order,
    "trend": _trend,
    "bound": _bound,
    "value": _best_setting,
}


# Analysis tables ----------------------------------------------------------------------------------


def _of_table(claim: Claim, rows: pd.DataFrame) -> Iterator[Part]:
    if claim.derive:
        rows = _DERIVED[claim.derive](rows)
    absent = {claim.value, *filter(None, (claim.x, claim.key)), *claim.by} - set(rows.columns)
    if absent:
        raise lacking(claim, f"{claim.table}.csv has no {', '.join(sorted(absent))}")
    rows = select(rows, claim.where)
    names = [n for n in ("model", "dataset") if n in rows.columns and n != claim.key]
    names += list(claim.by)
    for cell, group in rows.groupby(names, sort=True) if names else [((), rows)]:
        yield from _table_parts(claim, cell, group)


def _table_parts(claim: Claim, cell: Cell, group: pd.DataFrame) -> Iterator[Part]:
    if claim.kind == "order":
        named = {str(row[claim.key]): row for _, row in group.iterrows()}
        absent = [str(one) for one in claim.ranking if str(one) not in named]
        if absent:
            cause = f"no {claim.key} {', '.join(absent)} in {claim.table}.csv"
            raise lacking(claim, cause)
        values = [(str(one), table_draws(named[str(one)], claim.value, (*cell, one)))
                  for one in claim.ranking]  # fmt: skip
        yield from _margins(claim, cell, values, quantity_name(claim.value))
    elif claim.kind == "trend":
        ordered = group.sort_values(claim.x)
        curve = [_point(claim, row, (*cell, row[claim.x])) for _, row in ordered.iterrows()]
        yield from _shape(claim, quantity_name(claim.value), cell, ordered[claim.x].tolist(), curve)
    else:
        for _, row in group.iterrows():
            yield Part(quantity_name(claim.value), cell, table_draws(row, claim.value, cell))


def _point(claim: Claim, row: pd.Series[Any], key: Cell) -> Draws:
    """Return a point of a curve. For a rank correlation it does not vary.

    The points of a curve are of the same requests: drawn one by one they would lose their order.
    """
    if claim.flat_after is None:
        return constant(float(row[claim.value]))
    return table_draws(row, claim.value, key)


def _row_entropy(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the entropy over experts of each layer of the heatmaps."""
    long = rows.melt(
        ["model", "dataset", "layer", "expert"], ["coarse", "fine"], "granularity", "share"
    )
    keys = ["model", "dataset", "layer", "granularity"]
    share = long["share"] / long.groupby(keys)["share"].transform("sum")
    terms = np.where(share > 0, -share * np.log(share.where(share > 0, 1.0)), 0.0)
    return long.assign(nats=terms).groupby(keys)["nats"].sum().reset_index()


_DERIVED = {"row_entropy": _row_entropy}


# From parts to one number -------------------------------------------------------------------------


def _shape(
    claim: Claim, what: str, cell: Cell, x: Sequence[float], curve: Sequence[Draws]
) -> Iterator[Part]:
    if len(x) < 3:
        raise lacking(claim, f"{len(x)} values of {claim.x} make no trend")
    if claim.flat_after is None:
        sign = 1.0 if claim.direction == "rises" else -1.0
        label = f"{what} {claim.direction} with {quantity_name(claim.x)}"
        yield Part(label, cell, sign * spearman(x, curve))
        return
    if not x[0] < claim.flat_after < x[-1]:
        raise lacking(claim, f"{claim.x} does not reach beyond {claim.flat_after:g}")
    bend = min(range(1, len(x) - 1), key=lambda i: abs(x[i] - float(claim.flat_after or 0)))
    before = (curve[bend] - curve[0]) / (x[bend] - x[0])
    after = (curve[-1] - curve[bend]) / (x[-1] - x[bend])
    yield Part(f"slope of {what} up to {x[bend]:g}", cell, before)
    yield Part(f"slope of {what} beyond {x[bend]:g}", cell, after)


def summarise(claim: Claim, parts: Sequence[Part]) -> tuple[Draws, str]:
    """Return the number that a verdict is about, and what it is."""
    means = comparisons(parts)
    if claim.kind == "order":
        label = min(means, key=lambda one: float(means[one][0]))
        return means[label], f"least margin, {label}"
    if claim.kind == "trend" and claim.flat_after is not None:
        slopes = list(means.values())
        bent = np.where(slopes[0] > 0, ratio(slopes[1], slopes[0]), 1.0)
        return bent, "slope beyond over slope before"
    if claim.kind == "trend":
        rank = np.mean(list(means.values()), axis=0)
        return rank, "mean rank correlation in the claimed direction"
    if claim.kind == "bound" and claim.aggregate == "worst":
        worst = np.max if claim.at_most is not None else np.min
        return worst([part.draws for part in parts], axis=0), "worst cell"
    if claim.kind == "bound":
        return np.mean([part.draws for part in parts], axis=0), "share of the comparisons"
    over = "mean over cells" if len({part.cell for part in parts}) > 1 else "one cell"
    return np.mean(list(means.values()), axis=0), over


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
    options = [f"{n}={v}" for n, v in selector.items() if n != "system"]
    known = [_OPTIONS.get(option, option) for option in options]
    name = system_name(str(selector.get("system", "")))
    return f"{name} ({', '.join(filter(None, known))})" if any(known) else name


def cell_name(cell: Cell) -> str:
    """Return how reports call a cell."""
    if not cell:
        return "all"
    plain = [f"{one:g}" if isinstance(one, float) else str(one) for one in cell]
    names = [model_name(plain[0]), *map(dataset_name, plain[1:])]
    return ", ".join(names)
