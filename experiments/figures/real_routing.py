"""Beyond the paper: are policies ranked on a scale model's routing as on a real model's?"""

from pathlib import Path
from typing import Any

import pandas as pd

from experiments import style
from experiments.figures import charts

NAMES = ("real-routing", "Policies on the routing of a real model and of a scale model")
METRICS = ("hit_rate", "tpot_s")
BOUNDS = ("belady", "oracle")
NOTES = (
    f"Error bars: {charts.INTERVALS}. Dashed: bounds, which are told the routing. On real traces, "
    "which hold ids alone, FineMoE's maps are sparse and the choices before stand for embeddings.",
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw a column of panels for each routing, as `experiments.figures` says."""
    frame = charts.checked(frame, NAMES[0], mixed_modes)
    frame["source"] = [_source(run) for run in frame.to_dict("records")]
    charts.single(frame, NAMES[0], "source", "memory_budget")
    sources = list(frame.sort_values("weights", kind="stable")["source"].unique())
    looks = charts.looks(frame, BOUNDS)
    with charts.panels(METRICS, sources, style.PAGE_INCHES, 3.7) as (figure, panels):
        for axes, metric, source in panels:
            part = frame[frame["source"] == source]
            charts.lines(axes, part, "memory_budget_gb", metric, looks)
            charts.budget_axis(axes, part)
            axes.set_ylim(0, 103 if metric == "hit_rate" else None)
            axes.set_ylabel(style.METRICS[metric][0] if source == sources[0] else "")
            if metric == METRICS[0]:
                axes.set_title(source)
            else:
                axes.set_xlabel(charts.BUDGET)
        charts.legend(figure, looks, columns=6)
        data = charts.drawn_data(frame, [*METRICS, "ttft_s"], "source")
        charts.save(figure, output, NAMES, frame, data, [*NOTES, *agreement(frame, sources)])


def agreement(frame: pd.DataFrame, sources: list[str]) -> list[str]:
    """Say how alike routings rank the systems, bounds left out: Kendall's tau, the mean of budgets.

    Each of `sources` is compared with the last one, which is the scale model's.
    """
    systems = frame[~frame["system"].isin(BOUNDS)]
    *others, scale = sources
    notes = []
    for metric in METRICS:
        values = systems.pivot(index=["memory_budget", "series"], columns="source", values=metric)
        taus = values.groupby(level=0).corr("kendall")[scale].unstack()
        said = [
            f"{one} {taus[one].mean():.2f} ({taus[one].min():.2f} to {taus[one].max():.2f})"
            for one in others
        ]
        notes.append(
            f"Kendall's tau with {scale} in {style.METRICS[metric][0]}: {', '.join(said)}."
        )
    return notes


def _source(run: Any) -> str:
    """Name a run's routing: the file of a trace, or the model and its dataset."""
    trace = run["record"]["config"]["routing"]
    if trace:
        return Path(trace).stem
    return f"{style.model_name(run['model'])} ({run['weights']}), {run['dataset']}"
