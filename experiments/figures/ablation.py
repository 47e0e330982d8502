"""Beyond the paper: TPOT of the planner, and what it prefetches in vain, one option changed."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from experiments import style
from experiments.figures import charts

NAMES = ("ablation", "What each part of the planner is worth: one option changed at a time")
FORESIGHT = ("foresight", "What each kind of foresight would be worth to the planner")
METRIC, WASTED = "tpot_s", "bytes_wasted"
DEFAULTS = "defaults"
COLOUR, REFERENCE = "#A6761D", "#333333"
NOTES = (
    f"Error bars: {charts.INTERVALS}. Dashed: the first row. In vain: copies that left unused, of "
    "all measured requests."
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw a row of panels a model and dataset, as `experiments.figures` says."""
    frame = charts.checked(frame, NAMES[0], mixed_modes, system="planner")
    # The option that is not at its default, its value in short.
    changed = frame["label"].str.extract(r" (?P<name>.*?)=(?P<value>.*)").astype({"value": float})
    options = changed["name"] + "=" + changed["value"].map("{:g}".format)
    frame["option"] = options.fillna(DEFAULTS)
    default_first = frame.sort_values("option", key=lambda names: names != DEFAULTS, kind="stable")
    _draw(NAMES, default_first, output)


def draw_foresight(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """The same of what the planner is told, and of the oracle; nothing told comes first."""
    frame = charts.checked(frame, FORESIGHT[0], mixed_modes)
    told = frame["label"].str.partition("of=")[2].replace("", "layers")
    told = told.mask(frame["system"] == "oracle", "oracle")
    order = ["nothing", "start", "layers", "eviction", "layers+eviction", "everything", "oracle"]
    frame = frame.assign(option=pd.Categorical(told, order)).sort_values("option")
    _draw(FORESIGHT, frame.assign(option=frame["option"].astype(str)), output)


def _draw(names: tuple[str, str], frame: pd.DataFrame, output: Path) -> None:
    charts.single(frame, names[0])
    frame = frame.assign(low=np.nan, high=np.nan)  # of what has no interval
    models, datasets = charts.facets(frame)
    cells = list(product(models, datasets))
    with charts.panels(cells, (METRIC, WASTED), 0.3 + 1.55 * len(cells)) as (figure, panels):
        for axes, (model, dataset), metric in panels:
            part = charts.part_of(frame, model, dataset)
            values, spread = charts.interval(part, metric)
            rows = np.arange(len(part))
            ends = spread if spread.any() else None
            axes.barh(rows, values, 0.75, xerr=ends, color=COLOUR, error_kw=charts.CAPS)
            usual = values[:1]
            axes.vlines(usual, -0.5, rows[-1] + 0.5, REFERENCE, charts.REFERENCE_DASHES, lw=0.8)
            axes.set_ylim(rows[-1] + 0.5, -0.5)
            axes.set_yticks(rows, part["option"] if metric == METRIC else [""] * len(part))
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(style.METRICS[metric][0] if (model, dataset) == cells[-1] else "")
            if metric == METRIC:
                charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
        charts.apart(figure)
        metrics, bytes_moved = [METRIC, "ttft_s", "hit_rate"], ["bytes_prefetched", WASTED]
        doc = f"{names[1]}\n\n{NOTES}"
        charts.save(figure, output, names[0], doc, frame, metrics, *bytes_moved)
