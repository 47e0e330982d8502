"""Figure 16b of the paper (section 6.6): TTFT and TPOT against the batch size."""

from itertools import product
from pathlib import Path

import pandas as pd

from experiments import style
from experiments.figures import charts

NAMES = ("16b", "TTFT and TPOT against the batch size")
METRICS = ("ttft_s", "tpot_s")
NOTE = (
    f"Error bars: {charts.INTERVALS}; whole batches are resampled, for their requests share "
    "their times, so larger batches leave fewer samples."
)


def draw(frame: pd.DataFrame, output: Path, mixed_modes: bool = False) -> None:
    """Draw the figure, as `experiments.figures` says, of offline runs."""
    frame = charts.checked(frame, NAMES[0], mixed_modes, workload="offline")
    charts.single(frame, NAMES[0], "batch_size")
    models, datasets = charts.facets(frame)
    looks = charts.looks(frame)
    groups = {size: f"{size:g}" for size in sorted(set(frame["batch_size"]))}
    cells = list(product(models, datasets))
    size = style.COLUMN_INCHES, 0.75 + 1.4 * len(cells)
    with charts.panels(cells, METRICS, *size) as (figure, panels):
        for axes, (model, dataset), metric in panels:
            part = charts.part_of(frame, model, dataset)
            charts.bars(axes, part, metric, "batch_size", groups, looks)
            axes.set(xlabel="Batch size (requests)", ylabel=style.METRICS[metric][0])
            if len(cells) > 1:
                charts.panel_title(axes, model, dataset if len(datasets) > 1 else None)
        charts.legend(figure, looks, "bar", 2)
        data = charts.drawn_data(frame, METRICS, "batch_size")
        several = "s" if len(models) > 1 else ""
        notes = f"Model{several}: {', '.join(map(style.model_name, models))}.", NOTE
        charts.save(figure, output, NAMES, frame, data, notes)
