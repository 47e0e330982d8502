"""Figure 3 of the paper: expert activations of a request (coarse) and of an iteration (fine)."""

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

SHARES = {"coarse": "Coarse:\ncounts", "fine_counts": "Fine:\ncounts", "fine": "Fine:\ngate"}
MEASURES = {"counts": "activation counts", "gate": "gate probabilities"}


@analyses.of_traces
def heatmaps(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return activation shares of the first request and of its iteration halfway, by expert."""
    first = next(subject.routed.by_request())
    decoded = first.at(first.decode)
    halfway = len(decoded.maps) // 2
    layer, expert = np.indices(first.counts.shape[1:])
    coarse, fine = first.counts.sum(axis=0), decoded.counts[halfway]
    columns = {
        "layer": layer,
        "expert": expert,
        "coarse": coarse / coarse.sum(axis=1, keepdims=True),
        "fine": decoded.maps[halfway],
        "fine_counts": fine / fine.sum(axis=1, keepdims=True),
    }
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def draw_heatmaps(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw the first model on the first dataset: layers down, experts across, one colour scale."""
    record, heat = analyses.read_analysis(folder)
    model, dataset = str(heat["model"][0]), str(heat["dataset"][0])
    heat = charts.part_of(heat, model, dataset)
    layers, experts = heat["layer"].max() + 1, heat["expert"].max() + 1
    largest = heat[list(SHARES)].to_numpy().max()
    with charts.panels([""], list(SHARES), 2.3) as (figure, panels):
        for axes, _, kind in panels:
            shares = heat.pivot(index="layer", columns="expert", values=kind)
            image = axes.imshow(shares, cmap="rocket_r", vmin=0, vmax=largest, aspect="auto")
            axes.grid(visible=False)
            axes.set_title(SHARES[kind])
            axes.set(xlabel="Expert", xticks=range(0, experts, -(-experts // 4)))
            axes.set_yticks(range(0, layers, 4 if layers > 8 else 1))
            axes.label_outer()
        figure.axes[0].set_ylabel("Layer")
        bar = figure.colorbar(image, ax=figure.axes, pad=0.02, aspect=30)
        bar.set_label("Share of the layer")
        bar.outline.set_visible(False)
        whose = f"{style.model_name(model)} on {style.dataset_name(dataset)}"
        shows = (
            f"Left, the experts' shares of each layer's activations in one whole request of {whose}"
            "; middle, in the decode iteration halfway through it, which activates K experts a "
            "layer; right, the gate probabilities of that iteration. One colour scale. The request "
            "is the first of them."
        )
        analyses.save(figure, output, record, heat, shows, split=False)


@analyses.of_traces
def entropy(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean entropies by measure and granularity, with `uniform` (ln J) and `ln_top_k`."""
    routed, shape = subject.routed, subject.shape
    decoded, requests = routed.at(routed.decode), np.unique(routed.request)
    counts, gates = [], []
    for one in routed.by_request():
        tokens = one.counts[:, 0].sum(axis=-1)
        counts.append(one.counts.sum(axis=0))
        gates.append(np.tensordot(tokens, one.maps, axes=1))
    weights = {
        ("counts", "coarse"): (np.stack(counts), requests),
        ("counts", "fine"): (decoded.counts, decoded.request),
        ("gate", "coarse"): (np.stack(gates), requests),
        ("gate", "fine"): (decoded.maps, decoded.request),
    }
    rows = [
        (*key, *routing.mean_with_interval(routing.entropy(values).mean(axis=-1), request))
        for key, (values, request) in weights.items()
    ]
    frame = pd.DataFrame(rows, columns=["measure", "granularity", "nats", "low", "high"])
    return frame.assign(uniform=np.log(shape.experts), ln_top_k=np.log(shape.top_k))


def draw_entropy(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Mean over layers and over requests (coarse) or decode iterations (fine); above, of activation
    counts, where an iteration's is ln K by construction; below, of gate probabilities. Dashed: ln
    J, the entropy of uniform routing. Whiskers: 95 % bootstrap intervals over requests.
    """
    record, frame = analyses.read_analysis(folder)
    frame["series"] = frame["granularity"].str.capitalize()
    models, datasets = charts.facets(frame)
    top = frame["uniform"].max() * 1.05
    x = np.arange(len(models))
    with charts.panels(list(MEASURES), datasets, 2.9) as (figure, panels):
        for axes, measure, dataset in panels:
            rows = frame[(frame["measure"] == measure) & (frame["dataset"] == dataset)]
            groups = charts.model_groups(models)
            charts.bars(axes, rows, "nats", "model", groups, style.GRANULARITIES)
            uniform = rows.groupby("model")["uniform"].first().reindex(models)
            axes.hlines(uniform, x - 0.42, x + 0.42, "#333333", (0, (3, 2)), lw=0.8)
            axes.set_ylim(0, top)
            if measure == "counts":
                axes.set_title(style.dataset_name(dataset))
            axes.set_ylabel(f"Entropy of\n{MEASURES[measure]}\n(nats)")
            axes.label_outer()
        charts.legend(figure, style.GRANULARITIES, "bar")
        analyses.save(figure, output, record, frame, draw_entropy.__doc__, split=False)


@analyses.of_traces
def growth(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean entropies of the counts of a request's first n decode iterations."""
    decoded = subject.routed.at(subject.routed.decode)
    curves = [
        routing.entropy(one.counts[: experiment.iterations].cumsum(axis=0)).mean(axis=-1)
        for one in decoded.by_request()
    ]
    rows = []
    for n in range(max(map(len, curves))):
        values = np.array([curve[n] for curve in curves if len(curve) > n])
        mean = routing.mean_with_interval(values, np.arange(len(values)))
        rows.append((n + 1, *mean, len(values)))
    return pd.DataFrame(rows, columns=["iterations", "nats", "low", "high", "requests"])


def draw_growth(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Entropy of the activation counts of a request's first n decode iterations, mean over layers
    and requests. Bands: 95 % bootstrap intervals over requests.
    """
    record, frame = analyses.read_analysis(folder)
    models, datasets = charts.facets(frame)
    looks = charts.unmarked(style.model_looks(models))
    longest = frame["iterations"].max()
    with charts.panels([""], datasets, 1.8) as (figure, panels):
        for axes, _, dataset in panels:
            rows = frame[frame["dataset"] == dataset]
            charts.lines(axes, rows, "iterations", "nats", looks, by="model", band=True)
            axes.set(ylim=(0, frame["high"].max() * 1.08), ylabel=style.METRICS["nats"][0])
            axes.set(xlim=(0, longest * 1.02), xticks=range(0, longest + 1, max(1, longest // 5)))
            axes.set_xlabel("Decode iterations")
            axes.set_title(style.dataset_name(dataset))
            axes.label_outer()
        charts.apart(figure)
        charts.model_legend(figure, looks)
        analyses.save(figure, output, record, frame, draw_growth.__doc__, split=False)
