"""Figure 3b: mean entropy of a request's expert activations (coarse) and of an iteration's (fine).

Of activation counts, as the authors' demo takes it, a decode iteration's entropy is ln K by
construction: K experts, one hit each. So the entropy of gate probabilities is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig

from experiments.figures import charts, style, traces
from experiments.figures import routing_analysis as analysis
from experiments.figures.style import Drawn

MEASURES = {"counts": "activation counts", "gate": "gate probabilities"}
LOOKS = traces.GRANULARITIES


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write entropy.csv: measure, granularity, nats with interval, uniform (ln J), ln_top_k."""
    traces.analyse(cfg, recorded, folder, "entropy", entropies)


def entropies(subject: traces.Subject) -> pd.DataFrame:
    """Return mean entropies over layers and requests, or iterations, with 95 % intervals."""
    routed, shape = subject.routing.iterations, subject.shape
    decoded = routed.at(routed.decode)
    requests = np.unique(routed.request)
    values = {
        ("counts", "coarse"): (np.array(list(_of_requests(routed, gate=False))), requests),
        ("counts", "fine"): (_over_layers(decoded.counts), decoded.request),
        ("gate", "coarse"): (np.array(list(_of_requests(routed, gate=True))), requests),
        ("gate", "fine"): (_over_layers(decoded.maps), decoded.request),
    }
    rows = [(*key, *analysis.mean_with_interval(*found)) for key, found in values.items()]
    frame = pd.DataFrame(rows, columns=["measure", "granularity", "nats", "low", "high"])
    return frame.assign(uniform=np.log(shape.experts), ln_top_k=np.log(shape.top_k))


def _of_requests(routed: analysis.Iterations, gate: bool) -> Iterator[float]:
    """Yield the entropy of each request's counts, or of its tokens' mean gate probabilities."""
    for one in routed.by_request():
        tokens = one.counts[:, 0].sum(axis=-1)
        whole = np.tensordot(tokens, one.maps, axes=1) if gate else one.counts.sum(axis=0)
        yield float(analysis.entropy(whole).mean())


def _over_layers(weights: NDArray[np.generic]) -> NDArray[np.float64]:
    layers: NDArray[np.float64] = analysis.entropy(weights).mean(axis=-1)
    return layers


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw bars from zero: measures down, datasets across, ln J as a line over each model."""
    found = traces.read_analysis(folder)
    frame = found.table
    models, datasets = charts.facets(frame)
    with style.canvas(len(MEASURES), len(datasets), style.COLUMN_INCHES, 2.9) as figure:
        top = frame["uniform"].max() * 1.05
        cells = product(MEASURES.items(), datasets)
        for axes, ((measure, name), dataset) in zip(figure.axes, cells, strict=True):
            chosen = frame[(frame["measure"] == measure) & (frame["dataset"] == dataset)]
            traces.paired_bars(axes, chosen, "granularity", "nats", LOOKS, models)
            places = np.arange(len(models))
            uniform = chosen[chosen["granularity"] == "fine"].set_index("model")["uniform"]
            axes.hlines(
                uniform.reindex(models), places - 0.42, places + 0.42, "#333333", (0, (3, 2)),
                lw=0.8,
            )  # fmt: skip
            axes.set_ylim(0, top)
            axes.tick_params(axis="x", labelbottom=measure == "gate")
            axes.tick_params(axis="y", labelleft=dataset == datasets[0])
            if measure == "counts":
                axes.set_title(style.dataset_name(dataset), pad=3)
            if dataset == datasets[0]:
                axes.set_ylabel(f"Entropy of\n{name}\n(nats)")
        charts.legend(figure, LOOKS, "bar")
        return found.save(
            figure,
            place,
            "Mean over layers and over requests (coarse) or decode iterations (fine); above, of "
            "activation counts, where an iteration's is ln K by construction; below, of gate "
            "probabilities. Dashed: ln J, the entropy of uniform routing. "
            "Whiskers: 95 % bootstrap intervals over requests.",
            split=False,
        )
