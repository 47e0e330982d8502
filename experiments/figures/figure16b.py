"""Figure 16b of the paper (section 6.6): TTFT and TPOT against the batch size."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.figures import charts, style

ID = "16b"
TITLE = "TTFT and TPOT against the batch size"
SIZES = (1, 2, 4, 8)
SYSTEMS = ("mixtral_offload", "promoe", "moe_infinity", "finemoe")
COLUMNS = ("ttft_s", "tpot_s")
NOTE = (
    f"Error bars: {charts.INTERVALS}; whole batches are resampled, for their requests share "
    "their times, so larger batches leave fewer samples."
)


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    """Draw the figure, as `experiments.figures` says, of offline runs."""
    frame = charts.checked(frame, ID, mixed_modes, workload="offline")
    charts.single(frame, ID, "batch_size")
    models, datasets = charts.facets(frame)
    looks = charts.looks(frame)
    groups = {one: f"{one:g}" for one in sorted(set(frame["batch_size"]))}
    cells = [(model, dataset) for model in models for dataset in datasets]
    with style.canvas(len(cells), 2, style.COLUMN_INCHES, 0.75 + 1.4 * len(cells)) as figure:
        panels = iter(figure.axes)
        for model, dataset in cells:
            part = frame[(frame["model"] == model) & (frame["dataset"] == dataset)]
            for metric in COLUMNS:
                axes = next(panels)
                charts.bars(axes, part, metric, groups, looks, "batch_size")
                axes.set_ylabel(style.METRICS[metric][0])
                axes.set_xlabel("Batch size (requests)")
                if len(cells) > 1:
                    charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
        charts.legend(figure, looks, "bar", 2)
        data = charts.drawn_data(frame, COLUMNS, ["batch_size"])
        several = "s" if len(models) > 1 else ""
        notes = f"Model{several}: {', '.join(map(style.model_name, models))}.", NOTE
        return charts.save(
            figure, place, (ID, TITLE), frame, data, notes, model=models,
            series=charts.expected_series(frame, SYSTEMS), batch_size=sorted({*SIZES, *groups}),
        )  # fmt: skip
