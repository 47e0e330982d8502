"""Figure 3b: mean entropy of a request's expert activations (coarse) and of an iteration's (fine).

Of activation counts, as the authors' demo takes it, a decode iteration's entropy is ln K by
construction: K experts, one hit each. So the entropy of gate probabilities is drawn beside it.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts, routing

MEASURES = {"counts": "activation counts", "gate": "gate probabilities"}
LOOKS = style.GRANULARITIES
SHOWS = (
    "Mean over layers and over requests (coarse) or decode iterations (fine); above, of "
    "activation counts, where an iteration's is ln K by construction; below, of gate "
    "probabilities. Dashed: ln J, the entropy of uniform routing. "
    "Whiskers: 95 % bootstrap intervals over requests."
)


def entropies(subject: analyses.Subject, experiment: DictConfig) -> pd.DataFrame:
    """Return mean entropies over layers and requests, or iterations, with 95 % intervals.

    By measure and granularity, with `uniform` (ln J) and `ln_top_k`.
    """
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


analyse = partial(analyses.analyse, name="entropy", table=entropies)


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw bars from zero: measures down, datasets across, ln J as a line over each model."""
    record, frame = analyses.read_analysis(folder)
    frame["series"] = frame["granularity"].str.capitalize()
    models, datasets = charts.facets(frame)
    top = frame["uniform"].max() * 1.05
    x = np.arange(len(models))
    with charts.panels(list(MEASURES), datasets, style.COLUMN_INCHES, 2.9) as (figure, panels):
        for axes, measure, dataset in panels:
            rows = frame[(frame["measure"] == measure) & (frame["dataset"] == dataset)]
            charts.bars(axes, rows, "nats", "model", charts.model_groups(models), LOOKS)
            uniform = rows.groupby("model")["uniform"].first().reindex(models)
            axes.hlines(uniform, x - 0.42, x + 0.42, "#333333", (0, (3, 2)), lw=0.8)
            axes.set_ylim(0, top)
            if measure == "counts":
                axes.set_title(style.dataset_name(dataset))
            axes.set_ylabel(f"Entropy of\n{MEASURES[measure]}\n(nats)")
            axes.label_outer()
        charts.legend(figure, LOOKS, "bar")
        analyses.save(figure, output, record, frame.drop(columns="series"), SHOWS, split=False)
