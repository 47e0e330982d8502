"""Figure 10 of the paper (section 6.2): TTFT, TPOT and expert hit rate of all systems."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from experiments.figures import charts, style

ID = "10"
TITLE = "TTFT, TPOT and expert hit rate of all systems"
ROWS = ("ttft_s", "tpot_s", "hit_rate")
WHOLE_LAYERS = ("deepspeed",)
"""Systems that fetch every expert of a layer: what they hit says nothing of a prediction."""
REFERENCES = ("oracle",)
"""Drawn as a line across each group of bars: none of the systems that are compared."""
NOTES = (f"Error bars: {charts.INTERVALS}.", "Vertical axes of TTFT and TPOT differ by model.")
HOLLOW = (
    "Hollow: DeepSpeed fetches every expert of a layer before it runs, so that its hit "
    "rate rewards no prediction; the paper leaves it out."
)
REFERRED = (
    "Dashed: the oracle, no system of the paper's. It is told the routing beforehand, "
    "prefetches in order of next use and evicts what is needed last; as it is greedy, it "
    "shows what there is to win and is no proven bound."
)
WAITING = (
    "Mixtral-Offloading, too, waits for its prefetches before the gate asks: what came "
    "late counts as a hit there, and shows in TTFT and TPOT."
)


def draw_overall(
    names: tuple[str, str], frame: pd.DataFrame, place: Path, mixed_modes: bool = False
) -> style.Drawn:
    """Draw figure 10, or 13, which is the same on another testbed; `names`: id, title."""
    frame = charts.checked(frame, names[0], mixed_modes)
    charts.single(frame, names[0])
    referred = frame["system"].isin(REFERENCES)
    if referred.all():
        # Alone, it is a system like any other.
        referred = ~referred
    looks, references = charts.looks(frame[~referred]), charts.looks(frame[referred])
    hollow = sorted(set(frame.loc[frame["system"].isin(WHOLE_LAYERS), "series"]))
    groups = {one: style.dataset_name(one) for one in charts.facets(frame)[1]}

    def panel(axes: Axes, part: pd.DataFrame, metric: str) -> None:
        not_filled = hollow if metric == "hit_rate" else ()
        charts.bars(axes, part, metric, groups, looks, "dataset", not_filled, references)
        if metric == "hit_rate":
            charts.percent_axis(axes)

    waiting = "mixtral_offload" in set(frame["system"])
    told = ((HOLLOW, bool(hollow)), (REFERRED, bool(references)), (WAITING, waiting))
    notes = [*NOTES, *(note for note, applies in told if applies)]
    with charts.metric_panels(frame, ROWS, 4.6, panel) as figure:
        charts.legend(figure, looks, "bar", 6, narrow=2, references=references)
        data = charts.drawn_data(frame, ROWS)
        series = charts.expected_series(frame)
        return charts.save(figure, place, names, frame, data, notes, series=series)


draw = partial(draw_overall, (ID, TITLE))
