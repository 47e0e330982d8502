"""From a claim and the evidence to what was measured of it, cell by cell, as bootstrap draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.evidence import Evidence, Run, Table
from experiments.figures.style import dataset_name, model_name, system_name
from experiments.resampling import (
    RESAMPLES,
    Draws,
    cell_mean,
    constant,
    request_draws,
    spearman,
)

Kind = Literal["reduction", "increase", "order", "trend", "bound", "value"]
Selector = str | Mapping[str, Any]
"""A system's name, or settings that a run must have, `system` among them."""
Cell = tuple[Any, ...]
"""Model, dataset, and whatever else `by` names."""
LAST = "last"
"""In `where`: the largest value that the table has."""
Z95 = 1.959963984540054
OFFLOADED_RECORD_METRICS = ("sync_s", "sync_share")


class Untestable(Exception):
    """A claim that the records at hand cannot decide; the text says why and what would."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper; experiments/claims.yaml explains the fields."""

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
    runs: tuple[Run, ...] = ()
    tables: tuple[Table, ...] = ()
    paired: bool = True
    """Whether compared runs served the same requests."""

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(part.cell for part in self.parts))

    def comparisons(self) -> dict[str, Draws]:
        """Return each comparison over all its cells."""
        labels = dict.fromkeys(part.label for part in self.parts)
        return {
            label: cell_mean([one.draws for one in self.parts if one.label == label])
            for label in labels
        }


def measure(claim: Claim, evidence: Evidence) -> Finding:
    """Return what the records say about a claim; raise Untestable if they say nothing."""
    return _of_table(claim, evidence) if claim.table else _of_runs(claim, evidence)


def remedy(experiment: str) -> str:
    """Return the command that makes an experiment's records."""
    return f"run python -m experiments.reproduce {experiment}"


# Run records --------------------------------------------------------------------------------------


def _of_runs(claim: Claim, evidence: Evidence) -> Finding:
    here = _Cells(claim, evidence.runs(claim.experiment))
    there = _Cells(claim, evidence.runs(claim.versus)) if claim.versus else None
    parts = tuple(_RUN_PARTS[claim.kind](claim, here, there))
    draws, label = summarise(claim, parts)
    used = {run.digest: run for run in (*here.used, *(there.used if there else ()))}
    runs = tuple(used.values())
    return Finding(parts, draws, label, runs, (), _paired(runs))


class _Cells:
    """An experiment's runs by cell; remembers which of them were used."""

    def __init__(self, claim: Claim, runs: Sequence[Run]) -> None:
        wanted = [run for run in runs if run.matches(claim.where)]
        if not wanted:
            raise Untestable(remedy(claim.experiment))
        self.claim, self.used = claim, list[Run]()
        self._runs: dict[Cell, list[Run]] = {}
        for run in wanted:
            extra = tuple(run.setting(name) for name in claim.by)
            self._runs.setdefault((*run.cell, *extra), []).append(run)

    def __iter__(self) -> Iterator[Cell]:
        return iter(sorted(self._runs, key=str))

    def several(self, cell: Cell, selector: Selector) -> list[Run]:
        wanted = {"system": selector} if isinstance(selector, str) else selector
        found = [run for run in self._runs.get(cell, ()) if run.matches(wanted)]
        if not found:
            where = cell_name(cell)
            raise Untestable(
                f"no record of {selector_name(selector)} on {where}: "
                f"{remedy(self.claim.experiment)}"
            )
        self.used += found
        return found

    def one(self, cell: Cell, selector: Selector) -> Run:
        found = self.several(cell, selector)
        if len(found) > 1:
            raise Untestable(
                f"{len(found)} records of {selector_name(selector)} on {cell_name(cell)}, where "
                f"the claim is about one: narrow the experiment and {remedy(self.claim.experiment)}"
            )
        return found[0]


def run_draws(run: Run, metric: str) -> Draws:
    """Return a metric of one run, its requests resampled; sync_s and sync_share are one number."""
    if metric in OFFLOADED_RECORD_METRICS:
        total = synchronous_seconds(run)
        over = run.summary.get("busy_seconds") if metric == "sync_share" else iterations(run)
        if not over:
            raise Untestable(f"{run.digest[:12]} does not say how long it was busy: run it again")
        return constant(total / float(over))
    try:
        return request_draws(run.requests, metric, run.record["dataset"])
    except ValueError as error:
        raise Untestable(f"{error} in {run.digest[:12]}") from error


def synchronous_seconds(run: Run) -> float:
    """Return what a system adds to the critical path, expert loads on demand left out."""
    phases = run.summary["phase_seconds"]
    names = ["context_collection", "prefetch_wait"]
    if run.setting("system.asynchronous") is False:
        names += ["search", "prefetch_issue"]
    return float(sum(phases.get(name, 0.0) for name in names))


def iterations(run: Run) -> int:
    """Return how many iterations a run's requests took; those of a batch share theirs."""
    return int(run.requests.groupby("batch")["output_tokens"].max().sum())


def _gains(claim: Claim, cells: _Cells) -> Iterator[Part]:
    """Yield by how much the subject lowers each metric, as a share of the other's."""
    for cell in cells:
        for metric in claim.metric:
            subject = run_draws(cells.one(cell, claim.subject), metric)
            for other in claim.against:
                base = run_draws(cells.one(cell, other), metric)
                label = f"{quantity_name(metric)} against {selector_name(other)}"
                yield Part(label, cell, 1 - _share(subject, base))


def _reduction(claim: Claim, here: _Cells, _: _Cells | None) -> Iterator[Part]:
    return _gains(claim, here)


def _increase(claim: Claim, here: _Cells, _: _Cells | None) -> Iterator[Part]:
    """Yield rises over the other's mean over cells, so that a cell near 0 cannot rule the mean."""
    for metric in claim.metric:
        mine = {cell: run_draws(here.one(cell, claim.subject), metric) for cell in here}
        for other in claim.against:
            base = {cell: run_draws(here.one(cell, other), metric) for cell in here}
            usual = np.mean(list(base.values()), axis=0)
            label = f"{quantity_name(metric)} against {selector_name(other)}"
            for cell in mine:
                yield Part(label, cell, _share(mine[cell] - base[cell], usual))


def _share(above: Draws, below: Draws) -> Draws:
    with np.errstate(invalid="ignore", divide="ignore"):
        return above / below


def _order(claim: Claim, here: _Cells, there: _Cells | None) -> Iterator[Part]:
    if there is not None:
        theirs = {(part.label, part.cell): part.draws for part in _gains(claim, there)}
        for part in _gains(claim, here):
            if (part.label, part.cell) in theirs:
                difference = theirs[part.label, part.cell] - part.draws
                yield Part(f"reduction of {part.label}", part.cell, difference)
        return
    for cell in here:
        if claim.metric == ("origin",):
            yield from _origins(claim, here, cell)
            continue
        for metric in claim.metric:
            values = [
                (selector_name(one), run_draws(here.one(cell, one), metric))
                for one in claim.selectors
            ]
            yield from _margins(claim, cell, values, quantity_name(metric))


def _origins(claim: Claim, cells: _Cells, cell: Cell) -> Iterator[Part]:
    """Compare distances from the origin; of a system that ran at several budgets, the nearest."""
    runs = {selector_name(one): cells.several(cell, one) for one in claim.selectors}
    times = {name: [run_draws(run, "tpot_s") for run in some] for name, some in runs.items()}
    sizes = {name: [footprint(run) for run in some] for name, some in runs.items()}
    slowest = np.max([one for some in times.values() for one in some], axis=0)
    largest = max(one for some in sizes.values() for one in some)
    distances = [
        (
            name,
            np.min(
                [
                    np.hypot(time / slowest, size / largest)
                    for time, size in zip(times[name], sizes[name], strict=True)
                ],
                axis=0,
            ),
        )
        for name in runs
    ]
    yield from _margins(claim, cell, distances, "distance from the origin")


def footprint(run: Run) -> float:
    """Return bytes on the devices: experts in slots at the peak, and what is never offloaded."""
    return float(run.summary["peak_slot_bytes"] + run.summary["dense_bytes"])


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


def _trend(claim: Claim, here: _Cells, _: _Cells | None) -> Iterator[Part]:
    for cell in here:
        settings = sorted({float(run.setting(claim.x)) for run in here._runs[cell]})
        curves: dict[str, list[Draws]] = {}
        for at in settings:
            chosen = [run for run in here._runs[cell] if run.matches({claim.x: at})]
            inner = _Cells(claim, chosen)
            for part in _gains(claim, inner):
                curves.setdefault(part.label, []).append(part.draws)
            here.used += inner.used
        for label, curve in curves.items():
            yield from _shape(claim, f"reduction of {label}", cell, settings, curve)


def _bound(claim: Claim, here: _Cells, there: _Cells | None) -> Iterator[Part]:
    for cell in here:
        for metric in claim.metric:
            subject = run_draws(here.one(cell, claim.subject), metric)
            if there is not None:
                for one in claim.selectors:
                    mine = run_draws(here.one(cell, one), metric)
                    base = run_draws(there.one(cell, one), metric)
                    yield Part(f"{quantity_name(metric)} of {selector_name(one)}", cell,
                               np.abs(mine - base))  # fmt: skip
            elif claim.aggregate == "share":
                others = [run_draws(here.one(cell, one), metric) for one in claim.against]
                lowest = (subject < np.min(others, axis=0)).astype(float)
                yield Part(f"{quantity_name(metric)} lowest", cell, lowest)
            else:
                yield Part(quantity_name(metric), cell, subject)


def _best_setting(claim: Claim, here: _Cells, _: _Cells | None) -> Iterator[Part]:
    (metric,) = claim.metric
    for cell in here:
        runs = here.several(cell, claim.subject)
        settings = np.array(sorted({float(run.setting(claim.x)) for run in runs}))
        if len(settings) < 2 or len(settings) != len(runs):
            raise Untestable(
                f"{len(runs)} runs at {len(settings)} values of {claim.x} on {cell_name(cell)}: "
                f"{remedy(claim.experiment)}"
            )
        runs = sorted(runs, key=lambda run: float(run.setting(claim.x)))
        least = np.argmin([run_draws(run, metric) for run in runs], axis=0)
        yield Part(
            f"{quantity_name(claim.x)} with the lowest {quantity_name(metric)}",
            cell,
            settings[least],
        )


_RUN_PARTS = {
    "reduction": _reduction,
    "increase": _increase,
    "order": _order,
    "trend": _trend,
    "bound": _bound,
    "value": _best_setting,
}


def _paired(runs: Sequence[Run]) -> bool:
    """Tell whether the runs of each dataset and model served the same requests."""
    served: dict[Cell, set[tuple[tuple[int, int], ...]]] = {}
    for run in runs:
        table = run.requests.sort_values("request")
        lengths = zip(table["request"], table["output_tokens"], strict=True)
        served.setdefault(run.cell, set()).add(tuple(lengths))
    return all(len(one) == 1 for one in served.values())


# Analysis tables ----------------------------------------------------------------------------------


def _of_table(claim: Claim, evidence: Evidence) -> Finding:
    table = evidence.table(claim.experiment, claim.table)
    if table is None:
        raise Untestable(remedy(claim.experiment))
    rows = _DERIVED[claim.derive](table.rows) if claim.derive else table.rows
    lacking = {claim.value, *filter(None, (claim.x, claim.key)), *claim.by} - set(rows.columns)
    if lacking:
        raise Untestable(f"{claim.table}.csv has no {', '.join(sorted(lacking))}: "
                         f"{remedy(claim.experiment)}")  # fmt: skip
    rows = _where(rows, claim.where)
    if rows.empty:
        raise Untestable(f"{claim.table}.csv has no such rows: {remedy(claim.experiment)}")
    names = [n for n in ("model", "dataset") if n in rows.columns and n != claim.key]
    names += list(claim.by)
    groups = rows.groupby(names, sort=True) if names else [((), rows)]
    parts = tuple(part for cell, group in groups for part in _table_parts(claim, cell, group))
    if not parts:
        raise Untestable(f"{claim.table}.csv has nothing to compare: {remedy(claim.experiment)}")
    draws, label = summarise(claim, parts)
    return Finding(parts, draws, label, (), (table,))


def _where(rows: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
    for name, value in wanted.items():
        if name not in rows.columns:
            return rows.iloc[:0]
        rows = rows[rows[name] == (rows[name].max() if value == LAST else value)]
    return rows


def _table_parts(claim: Claim, cell: Cell, group: pd.DataFrame) -> Iterator[Part]:
    if claim.kind == "order":
        named = {str(row[claim.key]): row for _, row in group.iterrows()}
        absent = [str(one) for one in claim.ranking if str(one) not in named]
        if absent:
            raise Untestable(
                f"no {claim.key} {', '.join(absent)} in {claim.table}.csv: "
                f"{remedy(claim.experiment)}"
            )
        values = [(str(one), row_draws(named[str(one)], claim.value, (*cell, one)))
                  for one in claim.ranking]  # fmt: skip
        yield from _margins(claim, cell, values, quantity_name(claim.value))
    elif claim.kind == "trend":
        ordered = group.sort_values(claim.x)
        curve = [_point(claim, row, (*cell, row[claim.x])) for _, row in ordered.iterrows()]
        yield from _shape(claim, quantity_name(claim.value), cell, ordered[claim.x].tolist(), curve)
    else:
        for _, row in group.iterrows():
            yield Part(quantity_name(claim.value), cell, row_draws(row, claim.value, cell))


def _point(claim: Claim, row: pd.Series[Any], key: Cell) -> Draws:
    """Return a point of a curve. For a rank correlation it does not vary.

    The points of a curve are of the same requests: drawn one by one they would lose their order.
    """
    if claim.flat_after is None:
        return constant(float(row[claim.value]))
    return row_draws(row, claim.value, key)


def row_draws(row: pd.Series[Any], value: str, key: Cell) -> Draws:
    """Return a row's value, drawn from the normal distribution of its 95 % interval if it has one.

    Columns `low` and `high` are that interval.
    """
    estimate, low, high = float(row[value]), row.get("low"), row.get("high")
    draws = constant(estimate)
    if low is None or high is None or not np.isfinite([low, high]).all():
        return draws
    draws[1:] += _normals(key) * (float(high) - float(low)) / (2 * Z95)
    return draws


def _normals(key: Cell) -> Draws:
    words = [ord(letter) for letter in repr(key)]
    return np.random.default_rng(words).standard_normal(RESAMPLES)


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
        raise Untestable(f"{len(x)} values of {claim.x} make no trend: {remedy(claim.experiment)}")
    if claim.flat_after is None:
        sign = 1.0 if claim.direction == "rises" else -1.0
        yield Part(
            f"{what} {claim.direction} with {quantity_name(claim.x)}",
            cell,
            sign * spearman(x, curve),
        )
        return
    if not x[0] < claim.flat_after < x[-1]:
        raise Untestable(f"{claim.x} does not reach beyond {claim.flat_after:g}: "
                         f"{remedy(claim.experiment)}")  # fmt: skip
    bend = min(range(1, len(x) - 1), key=lambda i: abs(x[i] - float(claim.flat_after or 0)))
    before = (curve[bend] - curve[0]) / (x[bend] - x[0])
    after = (curve[-1] - curve[bend]) / (x[-1] - x[bend])
    yield Part(f"slope of {what} up to {x[bend]:g}", cell, before)
    yield Part(f"slope of {what} beyond {x[bend]:g}", cell, after)


def summarise(claim: Claim, parts: Sequence[Part]) -> tuple[Draws, str]:
    """Return the number that a verdict is about, and what it is."""
    if not parts:
        raise Untestable(f"nothing to compare: {remedy(claim.experiment)}")
    finding = Finding(tuple(parts), parts[0].draws, "")
    means = finding.comparisons()
    if claim.kind == "order":
        label = min(means, key=lambda one: float(means[one][0]))
        return means[label], f"least margin, {label}"
    if claim.kind == "trend" and claim.flat_after is not None:
        slopes = list(means.values())
        bent = np.where(slopes[0] > 0, _share(slopes[1], slopes[0]), 1.0)
        return bent, "slope beyond over slope before"
    if claim.kind == "trend":
        return np.mean(
            list(means.values()), axis=0
        ), "mean rank correlation in the claimed direction"
    if claim.kind == "bound" and claim.aggregate == "worst":
        worst = np.max if claim.at_most is not None else np.min
        return worst([part.draws for part in parts], axis=0), "worst cell"
    if claim.kind == "bound":
        return np.mean([part.draws for part in parts], axis=0), "share of the comparisons"
    over = "mean over cells" if len(finding.cells) > 1 else "one cell"
    return np.mean(list(means.values()), axis=0), over


# Names --------------------------------------------------------------------------------------------

_NAMES = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2el_s": "end-to-end latency",
    "hit_rate": "expert hit rate",
    "sync_s": "synchronous overhead an iteration",
    "sync_share": "synchronous share of the time served",
    "origin": "distance to the origin",
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
    options = [f"{n.removeprefix('system.')}={v}" for n, v in selector.items() if n != "system"]
    known = [_OPTIONS.get(option, option) for option in options]
    name = system_name(str(selector.get("system", "")))
    return f"{name} ({', '.join(filter(None, known))})" if any(known) else name


def cell_name(cell: Cell) -> str:
    """Return how reports call a cell."""
    if not cell:
        return "all"
    names = [model_name(str(cell[0])), *(dataset_name(str(one)) for one in cell[1:])]
    return ", ".join(names)
