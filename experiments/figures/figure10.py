"""Figures 10 and 13 of the paper (sections 6.2, 6.4): TTFT, TPOT and hit rate of all systems."""

from functools import partial
from pathlib import Path

import pandas as pd

from experiments import style
from experiments.figures import charts

TITLE = "TTFT, TPOT and expert hit rate of all systems"
METRICS = ("ttft_s", "tpot_s", "hit_rate")
WHOLE_LAYERS = "deepspeed"  # fetches all of a layer: its hits say nothing of a prediction
REFERENCE = "oracle"  # a line across each group of bars
NOTES = f"\n\nError bars: {charts.INTERVALS}. Vertical axes of TTFT and TPOT differ by model."
SYSTEM_NOTES = {
    WHOLE_LAYERS: "Hollow: DeepSpeed fetches every expert of a layer before it runs, so that its "
    "hit rate rewards no prediction; the paper leaves it out.",
    REFERENCE: "Dashed: the oracle, no system of the paper's. It is told the routing beforehand, "
    "prefetches in order of next use and evicts what is needed last; as it is greedy, it "
    "shows what there is to win and is no proven bound.",
    "mixtral_offload": "Mixtral-Offloading, too, waits for its prefetches before the gate asks, "
    "and MoE-Infinity for some, unless the reading has them go on: what came late counts as a "
    "hit there, and shows in TTFT and TPOT.",
}


def _draw(
    name: str, title: str, frame: pd.DataFrame, output: Path, mixed_modes: bool = False
) -> None:
    frame = charts.checked(frame, name, mixed_modes)
    charts.single(frame, name)
    looks = charts.looks(frame, [REFERENCE])
    hollow = set(frame.loc[frame["system"] == WHOLE_LAYERS, "series"])
    groups = {dataset: style.dataset_name(dataset) for dataset in charts.facets(frame)[1]}
    with charts.metric_panels(frame, METRICS, 4.6) as (figure, panels):
        for axes, metric, model in panels:
            part = frame[frame["model"] == model]
            not_filled = hollow if metric == "hit_rate" else set()
            charts.bars(axes, part, metric, "dataset", groups, looks, not_filled)
        charts.legend(figure, looks, "bar", 6, narrow=2)
        notes = [note for system, note in SYSTEM_NOTES.items() if system in set(frame["system"])]
        charts.save(figure, output, name, " ".join([f"{title}{NOTES}", *notes]), frame, METRICS)


draw = partial(_draw, "10", TITLE)
draw_13 = partial(_draw, "13", f"{TITLE} on testbed B")
