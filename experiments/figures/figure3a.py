"""Figure 3a: activation heatmaps of one request, whole (coarse) and one iteration of it (fine)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments.figures import routing_analysis as analysis
from experiments.figures import style, traces
from experiments.figures.style import Drawn

PANELS = {
    "coarse": "Coarse:\ncounts",
    "fine_counts": "Fine:\ncounts",
    "fine": "Fine:\ngate",
}


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write heatmaps.csv: layer, expert, and its share of the layer, as `shares` says."""
    traces.analyse(cfg, recorded, folder, "heatmaps", lambda one: shares(one.routing.iterations))


def shares(routed: analysis.Iterations) -> pd.DataFrame:
    """Return `analysis.heatmaps` and, beside its `fine`, `fine_counts` of the same iteration."""
    first = next(routed.by_request())
    decoded = first.counts[first.decode]
    counts = decoded[len(decoded) // 2]
    heat = analysis.heatmaps(routed).reset_index()
    return heat.assign(fine_counts=(counts / counts.sum(axis=1, keepdims=True)).ravel())


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw the first model on the first dataset: layers down, experts across, one colour scale."""
    found = traces.read_analysis(folder)
    heat = found.table
    first = heat[(heat["model"] == heat["model"][0]) & (heat["dataset"] == heat["dataset"][0])]
    layers, experts = first["layer"].max() + 1, first["expert"].max() + 1
    with style.canvas(1, len(PANELS), style.COLUMN_INCHES, 2.3) as figure:
        largest = first[list(PANELS)].to_numpy().max()
        for axes, (kind, name) in zip(figure.axes, PANELS.items(), strict=True):
            shares = first.pivot(index="layer", columns="expert", values=kind)
            image = axes.imshow(shares, cmap="rocket_r", vmin=0, vmax=largest, aspect="auto")
            axes.grid(visible=False)
            axes.set_title(name, pad=3)
            axes.set(xlabel="Expert", xticks=range(0, experts, -(-experts // 4)))
            axes.set_yticks(range(0, layers, 4 if layers > 8 else 1))
        figure.axes[0].set_ylabel("Layer")
        for axes in figure.axes[1:]:
            axes.tick_params(labelleft=False)
        bar = figure.colorbar(image, ax=figure.axes, pad=0.02, aspect=30)
        bar.set_label("Share of the layer")
        bar.outline.set_visible(False)
        model, dataset = first["model"].iloc[0], first["dataset"].iloc[0]
        caption = found.caption(
            f"Left, the experts' shares of each layer's activations in one whole request of "
            f"{style.model_name(model)} on {style.dataset_name(dataset)}; middle, in the decode "
            "iteration halfway through it, which activates K experts a layer; right, the gate "
            "probabilities of that iteration. One colour scale. The request is the first of them.",
            split=False,
        )
        return style.save(figure, first, place, found.record["id"], caption)
