"""Figure 10 of the paper (section 6.2): TTFT, TPOT and expert hit rate of all systems."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.figures import charts, style

ID = "10"
TITLE = "TTFT, TPOT and expert hit rate of all systems"
ROWS = ("ttft_s", "tpot_s", "hit_rate")
WHOLE_LAYERS = ("deepspeed",)
"""Systems that fetch every expert of a layer: what they hit says nothing of a prediction."""
REFERENCES = ("oracle",)
"""Drawn as a line across each group of bars: none of the systems that are compared."""


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure into the folder `place`; `frame` is a `run_frame`.

    Raises UserError without records, for mixed modes unless asked for, and for two of one cell.
    """
    return draw_overall(frame, place, mixed_modes, ID, TITLE)


def draw_overall(
    frame: pd.DataFrame, place: Path, mixed_modes: bool, figure_id: str, title: str
) -> style.Drawn:
    """Draw figure 10, or 13, which is the same on another testbed."""
    frame = charts.checked(frame, figure_id, mixed_modes)
    charts.single(frame, ("model", "dataset", "series"), figure_id)
    models, datasets = charts.facets(frame)
    referred = frame["system"].isin(REFERENCES)
    if referred.all():
        # Alone, it is a system like any other.
        referred = ~referred
    looks, references = charts.looks(frame[~referred]), charts.looks(frame[referred])
    hollow = sorted(set(frame.loc[frame["system"].isin(WHOLE_LAYERS), "series"]))
    groups = {one: style.dataset_name(one) for one in datasets}
    width = style.PAGE_INCHES if len(models) > 1 else style.COLUMN_INCHES
    with style.canvas(len(ROWS), len(models), width, 4.6) as figure:
        panels = iter(figure.axes)
        for metric in ROWS:
            for column, model in enumerate(models):
                axes = next(panels)
                part = frame[frame["model"] == model]
                not_filled = hollow if metric == "hit_rate" else ()
                charts.bars(axes, part, metric, groups, looks, "dataset", not_filled)
                charts.references(axes, part, metric, groups, references, "dataset")
                if metric == ROWS[0]:
                    charts.panel_title(axes, model, None)
                if metric == "hit_rate":
                    charts.percent_axis(axes)
                if column == 0:
                    axes.set_ylabel(style.METRICS[metric][0])
        figure.align_ylabels()
        charts.legend(figure, looks, "bar", 6 if len(models) > 1 else 2, references)
        return style.save(
            figure,
            charts.drawn_data(frame, ROWS),
            place,
            figure_id,
            _caption(frame, figure_id, title, bool(hollow), bool(references)),
        )


def _caption(frame: pd.DataFrame, figure_id: str, title: str, hollow: bool, referred: bool) -> str:
    notes = [f"Error bars: {charts.INTERVALS}.", "Vertical axes of TTFT and TPOT differ by model."]
    if hollow:
        notes.append(
            "Hollow: DeepSpeed fetches every expert of a layer before it runs, so that its hit "
            "rate rewards no prediction; the paper leaves it out."
        )
    if referred:
        notes.append(
            "Dashed: the oracle, no system of the paper's. It is told the routing beforehand, "
            "prefetches in order of next use and evicts what is needed last; as it is greedy, it "
            "shows what there is to win and is no proven bound."
        )
    if "mixtral_offload" in set(frame["system"]):
        notes.append(
            "Mixtral-Offloading, too, waits for its prefetches before the gate asks: what came "
            "late counts as a hit there, and shows in TTFT and TPOT."
        )
    gap = charts.gaps(
        frame,
        {
            "model": charts.expected_models(frame),
            "dataset": charts.facets(frame)[1],
            "series": charts.expected_series(frame, style.PAPER_SYSTEMS),
        },
    )
    return charts.caption(figure_id, title, frame, notes, gap)
