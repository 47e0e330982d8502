"""Latency and hit rates over what is varied: memory, prefetch distance, batch size, routing."""

import math
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments import style
from experiments.figures import charts

TIMES = ("ttft_s", "tpot_s")
PAPER_DISTANCE = {"mixtral": 3, "qwen": 6, "phi": 4}  # found best in section 6.1
DATASET_LOOKS = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "D"), ("#CC79A7", "^"))
BOUNDS = ("belady", "oracle")


def figure1b(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """End-to-end request latency against memory, all systems and no offloading.

    Error bars: 95 % bootstrap intervals of the mean. The latency axis is logarithmic. Memory: the
    expert budget (all experts where nothing is offloaded) and the weights that are always resident;
    keys, values and activations are not counted.
    """
    frame = charts.checked(frame, "1b", mixed_modes)
    frame["memory_gb"] = (frame["slot_budget_bytes"] + frame["dense_bytes"]) / 1e9
    charts.single(frame, "1b", "memory_gb")
    own: style.Look = {"markersize": 5.5}
    if not frame.duplicated(["model", "dataset", "series"]).any():
        own["linestyle"] = ""
    looks = {name: {**look, **own} for name, look in charts.looks(frame).items()}
    with charts.dataset_panels(frame, "Memory for weights (GB)", "e2el_s") as (figure, panels):
        for axes, part in panels:
            charts.lines(axes, part, "memory_gb", "e2el_s", looks)
            axes.set_xlim(0, 1.12 * part["memory_gb"].max())
            charts.log_axis(axes)
            axes.set_ylim(0.7 * part["e2el_s"].min(), 1.4 * part["e2el_s"].max())
            axes.xaxis.set_major_locator(MaxNLocator(5))
        charts.legend(figure, looks, columns=6, narrow=2)
        charts.save(figure, output, "1b", figure1b.__doc__, frame, ["e2el_s"], "memory_gb")


def figure12(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """TPOT against the memory limit of the expert cache.

    Error bars: 95 % bootstrap intervals of the mean. Limits above what all experts take (Mixtral
    90 GB, Qwen 25 GB, Phi 81 GB) hold them all.
    """
    frame = charts.checked(frame, "12", mixed_modes)
    asked = pd.to_numeric(frame["memory_budget"], errors="coerce")
    frame["limit_gb"] = asked.fillna(frame["memory_budget_gb"]).astype(float)
    charts.single(frame, "12", "limit_gb")
    looks, limits = charts.looks(frame), sorted(set(frame["limit_gb"]))
    with charts.dataset_panels(frame, "Expert cache limit (GB)", "tpot_s") as (figure, panels):
        for axes, part in panels:
            charts.lines(axes, part, "limit_gb", "tpot_s", looks, limits)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(limits, [f"{limit:g}" for limit in limits])
            axes.set_ylim(bottom=0)
        charts.legend(figure, looks, narrow=2)
        charts.save(figure, output, "12", figure12.__doc__, frame, ["tpot_s"], "limit_gb")


def figure15(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """TTFT and TPOT of FineMoE against the prefetch distance d.

    Error bars: 95 % bootstrap intervals of the mean. Dotted: the distance that the paper found
    best. Vertical axes do not start at zero.
    """
    frame = charts.checked(frame, "15", mixed_modes, system="finemoe")
    frame["series"] = charts.named_after(frame["dataset"].map(style.dataset_name), frame)
    charts.single(frame, "15", "prefetch_distance")
    base = dict(zip(charts.facets(frame)[1], cycle(DATASET_LOOKS), strict=False))
    looks = charts.variants(frame, "dataset", base)
    distances = sorted(set(frame["prefetch_distance"]))
    with charts.metric_panels(frame, TIMES, 3.0) as (figure, panels):
        for axes, metric, model in panels:
            if model in PAPER_DISTANCE:
                axes.axvline(PAPER_DISTANCE[model], color="#777777", linestyle=":", zorder=1)
            part = frame[frame["model"] == model]
            charts.lines(axes, part, "prefetch_distance", metric, looks, distances)
            axes.set_xticks(distances)
            axes.margins(y=0.15)
            if metric != TIMES[0]:
                axes.set_xlabel("Prefetch distance d (layers)")
        if len(looks) > 1:
            charts.legend(figure, looks)
        charts.save(figure, output, "15", figure15.__doc__, frame, TIMES, "prefetch_distance")


def figure16b(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """TTFT and TPOT against the batch size.

    {models} Error bars: 95 % bootstrap intervals of the mean; whole batches are resampled, for
    their requests share their times, so larger batches leave fewer samples.
    """
    frame = charts.checked(frame, "16b", mixed_modes, workload="offline")
    charts.single(frame, "16b", "batch_size")
    models, datasets = charts.facets(frame)
    looks = charts.looks(frame)
    groups = {size: f"{size:g}" for size in sorted(set(frame["batch_size"]))}
    cells = list(product(models, datasets))
    with charts.panels(cells, TIMES, 0.75 + 1.4 * len(cells)) as (figure, panels):
        for axes, (model, dataset), metric in panels:
            part = charts.part_of(frame, model, dataset)
            charts.bars(axes, part, metric, "batch_size", groups, looks)
            axes.set(xlabel="Batch size (requests)", ylabel=style.METRICS[metric][0])
            if len(cells) > 1:
                charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
        charts.legend(figure, looks, "bar", 2)
        several = "s" if len(models) > 1 else ""
        named = f"Model{several}: {', '.join(map(style.model_name, models))}."
        doc = str(figure16b.__doc__).format(models=named)
        charts.save(figure, output, "16b", doc, frame, TIMES, "batch_size")


def frontier(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """TPOT against the memory for experts.

    Error bars: 95 % bootstrap intervals of the mean. Vertical axes are logarithmic and differ by
    model. Dotted: nothing offloaded, compute alone. Dashed: the oracle, a greedy reference that is
    told the routing beforehand. {bound}
    """
    frame = charts.checked(frame, "frontier", mixed_modes)
    charts.single(frame, "frontier", "memory_budget")
    metrics = ["tpot_s", "ttft_s", "hit_rate"]
    of_oracle = frame[frame["system"] == "oracle"].dropna(subset="bound_tpot_s")
    bound = of_oracle.assign(series="Lower bound", system="bound", label="bound")
    bound[[f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]] = math.nan
    frame = pd.concat([frame, bound.assign(tpot_s=bound["bound_tpot_s"])], ignore_index=True)
    looks = charts.looks(frame, ["oracle", "resident", "bound"])
    for system, dashes in (("resident", ":"), ("bound", "-.")):
        for name in set(frame.loc[frame["system"] == system, "series"]):
            looks[name]["linestyle"] = dashes
    with charts.dataset_panels(frame, charts.BUDGET, "tpot_s") as (figure, panels):
        for axes, part in panels:
            floor = part["system"] == "resident"
            for name, tpot in part.loc[floor, ["series", "tpot_s"]].itertuples(index=False):
                axes.axhline(1e3 * tpot, **looks[name])
            charts.lines(axes, part[~floor], "memory_budget_gb", "tpot_s", looks)
            charts.budget_axis(axes, part[~floor])
            charts.log_axis(axes)
        charts.legend(figure, looks, narrow=2)
        said = "Dash-dotted: the bound of all that compute nothing on the host."
        doc = str(frontier.__doc__).format(bound=said if len(bound) else "")
        charts.save(figure, output, "frontier", doc, frame, metrics)


def rates(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """End-to-end latency against the request rate, online serving.

    Error bars: 95 % bootstrap intervals of the mean, as if requests that queue together were
    independent. Latency counts from the arrival, queueing included; its axis is logarithmic. Where
    a line turns upwards, requests arrive faster than the system serves them.
    """
    frame = charts.checked(frame, "rates", mixed_modes, workload="online")
    frame["rate"] = [record["config"]["workload"]["rate"] for record in frame["record"]]
    charts.single(frame, "rates", "rate")
    looks = charts.looks(frame)
    with charts.dataset_panels(frame, "Requests a second", "e2el_s") as (figure, panels):
        for axes, part in panels:
            charts.lines(axes, part, "rate", "e2el_s", looks)
            charts.log_axis(axes)
            axes.set_xlim(left=0)
        charts.legend(figure, looks, narrow=2)
        metrics = ["e2el_s", "ttft_s", "tpot_s"]
        charts.save(figure, output, "rates", rates.__doc__, frame, metrics, "rate")


def real_routing(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Policies on the routing of a real model and of a scale model.

    Error bars: 95 % bootstrap intervals of the mean. Dashed: bounds, which are told the routing. On
    real traces, which hold ids alone, FineMoE's maps are sparse and the choices before stand for
    embeddings.
    """
    frame = charts.checked(frame, "real-routing", mixed_modes)
    frame["source"] = [_source(run) for run in frame.to_dict("records")]
    charts.single(frame, "real-routing", "source", "memory_budget")
    sources = list(frame.sort_values("weights", kind="stable")["source"].unique())
    looks, metrics = charts.looks(frame, BOUNDS), ("hit_rate", "tpot_s")
    with charts.panels(metrics, sources, 3.7, style.PAGE_INCHES) as (figure, panels):
        for axes, metric, source in panels:
            part = frame[frame["source"] == source]
            charts.lines(axes, part, "memory_budget_gb", metric, looks)
            charts.budget_axis(axes, part)
            axes.set_ylim(0, 103 if metric == "hit_rate" else None)
            axes.set_ylabel(style.METRICS[metric][0] if source == sources[0] else "")
            if metric == "hit_rate":
                axes.set_title(source)
            else:
                axes.set_xlabel(charts.BUDGET)
        charts.legend(figure, looks, columns=6)
        agree = (_agreement(frame, sources, metric) for metric in metrics)
        doc = " ".join([str(real_routing.__doc__), *agree])
        charts.save(figure, output, "real-routing", doc, frame, [*metrics, "ttft_s"], "source")


def _agreement(frame: pd.DataFrame, sources: list[str], metric: str) -> str:
    """Say how alike routings rank systems: Kendall's tau with the last, mean of budgets."""
    systems = frame[~frame["system"].isin(BOUNDS)]
    *others, scale = sources
    values = systems.pivot(index=["memory_budget", "series"], columns="source", values=metric)
    taus = values.groupby(level=0).corr("kendall")[scale].unstack()
    said = [
        f"{one} {taus[one].mean():.2f} ({taus[one].min():.2f} to {taus[one].max():.2f})"
        for one in others
    ]
    return f"Kendall's tau with {scale} in {style.METRICS[metric][0]}: {', '.join(said)}."


def _source(run: Any) -> str:
    trace = run["record"]["config"]["routing"]
    if trace:
        return Path(trace).stem
    return f"{style.model_name(run['model'])} ({run['weights']}), {run['dataset']}"
