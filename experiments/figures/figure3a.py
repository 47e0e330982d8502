"""Figure 3a: activation heatmaps of one request, whole (coarse) and one iteration of it (fine)."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts

PANELS = {"coarse": "Coarse:\ncounts", "fine_counts": "Fine:\ncounts", "fine": "Fine:\ngate"}
SHOWS = (
    "Left, the experts' shares of each layer's activations in one whole request of {model} on "
    "{dataset}; middle, in the decode iteration halfway through it, which activates K experts a "
    "layer; right, the gate probabilities of that iteration. One colour scale. The request is the "
    "first of them."
)


def heatmaps(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return activation shares of the first request, by layer and expert.

    `coarse` is the request's activation counts over their sum in a layer; `fine` is the gate
    probabilities, and `fine_counts` the counts, of the decode iteration halfway through it.
    """
    first = next(subject.routed.by_request())
    decoded = first.at(first.decode)
    halfway = len(decoded.maps) // 2
    layer, expert = np.indices(first.counts.shape[1:])
    columns = {
        "layer": layer,
        "expert": expert,
        "coarse": _shares(first.counts.sum(axis=0)),
        "fine": decoded.maps[halfway],
        "fine_counts": _shares(decoded.counts[halfway]),
    }
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def _shares(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts / counts.sum(axis=1, keepdims=True))


analyse = partial(analyses.analyse, name="heatmaps", table=heatmaps)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw the first model on the first dataset: layers down, experts across, one colour scale."""
    record, heat = analyses.read_analysis(folder)
    model, dataset = str(heat["model"][0]), str(heat["dataset"][0])
    heat = charts.part_of(heat, model, dataset)
    layers, experts = heat["layer"].max() + 1, heat["expert"].max() + 1
    largest = heat[list(PANELS)].to_numpy().max()
    with charts.panels([""], list(PANELS), style.COLUMN_INCHES, 2.3) as (figure, panels):
        for axes, _, kind in panels:
            shares = heat.pivot(index="layer", columns="expert", values=kind)
            image = axes.imshow(shares, cmap="rocket_r", vmin=0, vmax=largest, aspect="auto")
            axes.grid(visible=False)
            axes.set_title(PANELS[kind])
            axes.set(xlabel="Expert", xticks=range(0, experts, -(-experts // 4)))
            axes.set_yticks(range(0, layers, 4 if layers > 8 else 1))
            axes.label_outer()
        figure.axes[0].set_ylabel("Layer")
        bar = figure.colorbar(image, ax=figure.axes, pad=0.02, aspect=30)
        bar.set_label("Share of the layer")
        bar.outline.set_visible(False)
        names = {"model": style.model_name(model), "dataset": style.dataset_name(dataset)}
        analyses.save(figure, output, record, heat, SHOWS.format(**names), split=False)
