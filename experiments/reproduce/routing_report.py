"""Report what models route: ``python -m experiments.reproduce.routing_report weights=scale``.

Load balance, entropy, overlap of consecutive tokens, and how far ahead each predictor sees, for
every model and dataset, against uniform chance: tables on the terminal, and pictures with their
data and a JSON record in the output folder. What the paper draws of routing is drawn by
`python -m experiments.reproduce 3a 3b 3c 4 8 9 16a`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from experiments.errors import UserError, command
from experiments.figures import routing
from experiments.figures import routing_analysis as analysis
from experiments.figures import routing_predictors as prediction
from experiments.run.console import Console
from experiments.run.records import provenance
from experiments.run.routing_source import kept_trace
from experiments.run.weights import SCALE_MODELS
from finemoe.files import write_json
from finemoe.offload.policy import ModelShape
from finemoe.trace_file import TraceReader

FAIR_SHARE_FLOOR = 0.2
"""An expert with less than a fifth of its fair share is called neglected."""
DISTANCES = range(1, 9)
"""The prefetch distances of figure 15."""

BY_LAYER = {
    ("load_balance", "smallest"): "smallest load / fair share, prompts",
    ("load_balance", "largest"): "largest load / fair share, prompts",
    ("load_balance", "smallest_all"): "smallest load / fair share, all",
    ("load_balance", "largest_all"): "largest load / fair share, all",
    ("entropy", "coarse"): "entropy, request (nats)",
    ("entropy", "fine_counts"): "entropy, iteration, counts (nats)",
    ("entropy", "fine_gate"): "entropy, iteration, gate (nats)",
    ("overlap", "overlap"): "overlap of consecutive tokens",
}
"""Table and column of what is found of every layer, to its name on the terminal."""

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Subject:
    """One model on one dataset, and what its report found."""

    model: str
    dataset: str
    shape: ModelShape
    distance: int
    """The model's prefetch distance d (section 6.1)."""
    requests: int
    history: int
    """How many of the requests are history."""
    origin: Mapping[str, Any]
    """Where its routing came from, as its trace says."""
    tables: Tables

    @property
    def chance(self) -> float:
        """What K experts drawn uniformly would hit: K/J."""
        return self.shape.top_k / self.shape.experts


# From a recorded trace to tables ------------------------------------------------------------------


def investigate(cfg: DictConfig, console: Console) -> Subject:
    """Record the routing of `cfg.model` on `cfg.dataset`, or take the kept trace; analyse it.

    `cfg` is what `subject_configs` yields. Raises UserError or TraceError.
    """
    cut = history_length(cfg)
    with TraceReader(kept_trace(cfg, console)) as reader:
        header = reader.header
        routed = analysis.iterations(list(reader.requests()))
    history, measured = routed.at(routed.request < cut), routed.at(routed.request >= cut)
    shape, distance = header.shape, min(cfg.model.prefetch_distance, header.shape.layers - 1)
    searched = prediction.search(history, measured, shape, cfg.store_capacity, distance)
    named = prediction.predictors(history, measured, searched, header.gates, shape.top_k)
    rates = prediction.hit_rates_by_distance(named, measured, DISTANCES)
    chance = shape.top_k / shape.experts
    tables = {
        "load_balance": _balance(routed).assign(uniform=1.0),
        "entropy": analysis.entropies(routed).assign(uniform=np.log(shape.experts)).reset_index(),
        "overlap": analysis.consecutive_overlap(routed).assign(uniform=chance).reset_index(),
        "hit_rates": rates.assign(chance=chance),
    }
    counted = int(routed.request[-1]) + 1, cut
    names = cfg.model.name, cfg.dataset.name
    return Subject(*names, shape, distance, *counted, header.provenance, tables)


def history_length(cfg: DictConfig) -> int:
    """Return how many requests are history; raise UserError if that leaves nothing to analyse."""
    prompts, share = cfg.workload.prompts, cfg.workload.history_share
    cut = round(share * prompts)
    if not 0 < cut < prompts:
        raise UserError(
            f"workload.history_share={share} of {prompts} prompts leaves no history, or none to "
            "judge predictors on; change it or add prompts"
        )
    if cfg.workload.output_tokens < 3:
        raise UserError("workload.output_tokens below 3 leaves no decoded tokens to compare")
    return cut


def _balance(routed: analysis.Iterations) -> pd.DataFrame:
    """Return the load balance over the prompts' tokens, and over all with what was generated."""
    prompts = analysis.load_balance(routed.at(~routed.decode))
    return prompts.join(analysis.load_balance(routed).add_suffix("_all")).reset_index()


# On the terminal --------------------------------------------------------------------------------


def print_subject(subject: Subject, weights: str, console: RichConsole) -> None:
    """Print one table of the routing and one of the predictors."""
    shape = subject.shape
    console.print(
        f"[bold]{subject.model} on {subject.dataset}[/] ({weights} weights, "
        f"{shape.layers} x {shape.experts}, top-{shape.top_k})"
    )
    layers = _table("over layers", "mean", "least", "most", "uniform")
    for (table, column), label in BY_LAYER.items():
        layers.add_row(label, *_spread(subject.tables[table], column))
    console.print(layers)
    rates = hit_rates(subject)
    predictors = _table("hit rate at d =", *map(str, rates.columns))
    for predictor, row in rates.iterrows():
        predictors.add_row(str(predictor), *(f"{value:.3f}" for value in row))
    console.print(predictors)
    for line in shortcomings(subject):
        console.print(line, soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def hit_rates(subject: Subject) -> pd.DataFrame:
    """Return hit rates, one row a predictor (best first) or chance, one column a distance."""
    rates = subject.tables["hit_rates"]
    wide = rates.pivot(index="predictor", columns="distance", values="hit_rate")
    wide.loc["chance"] = subject.chance
    return wide.loc[wide.mean(axis=1).sort_values(ascending=False).index]


def shortcomings(subject: Subject) -> list[str]:
    """Say which layers neglect an expert, and which predictors are not clearly above chance."""
    loads = subject.tables["load_balance"]
    neglecting = loads.loc[loads["smallest"] < FAIR_SHARE_FLOOR, "layer"].tolist()
    rates = subject.tables["hit_rates"].query("distance == @subject.distance")
    weak = rates.loc[rates["low"] <= subject.chance, "predictor"].tolist()
    return [
        f"layers with an expert below a fifth of its fair share of prompt tokens: "
        f"{', '.join(map(str, neglecting)) or 'none'}",
        f"predictors not above chance at d = {subject.distance} (95 % interval): "
        f"{', '.join(weak) or 'none'}",
    ]


def _spread(table: pd.DataFrame, column: str) -> Iterator[str]:
    """Yield mean, least and most over layers, and what uniform routing would give."""
    values = table[column]
    for one in (values.mean(), values.min(), values.max(), table["uniform"].iloc[0]):
        yield f"{one:.3f}"


# Files ------------------------------------------------------------------------------------------


def write_report(subjects: Sequence[Subject], cfg: DictConfig, folder: Path) -> Path:
    """Draw every table, its data beside it, then write the record; return its path."""
    tables, summaries = joined_tables(subjects), [_summary(subject) for subject in subjects]
    for name in routing.BY_LAYER:
        routing.draw_by_layer(name, tables[name], summaries, folder)
    routing.draw_rates(tables["hit_rates"], summaries, folder)
    record = {
        "config": OmegaConf.to_container(cfg, resolve=False),
        "routing": "the model's own gates",
        "subjects": summaries,
        **provenance(),
    }
    write_json(folder / "routing_report.json", record)
    return folder / "routing_report.json"


def joined_tables(subjects: Sequence[Subject]) -> Tables:
    """Return each table over all subjects, with columns model and dataset in front."""
    keys = [(subject.model, subject.dataset) for subject in subjects]
    return {
        name: pd.concat([s.tables[name] for s in subjects], keys=keys, names=["model", "dataset"])
        .reset_index(["model", "dataset"])
        .reset_index(drop=True)
        for name in subjects[0].tables
    }


def _summary(subject: Subject) -> dict[str, Any]:
    """Return means over layers and hit rates at d."""
    tables, shape = subject.tables, subject.shape
    rates = tables["hit_rates"].query("distance == @subject.distance").set_index("predictor")
    return {
        "model": subject.model,
        "dataset": subject.dataset,
        "weights": subject.origin.get("weights", "unknown"),
        "requests": subject.requests,
        "measured_requests": subject.requests - subject.history,
        "layers": shape.layers,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "smallest_load": float(tables["load_balance"]["smallest"].min()),
        "largest_load": float(tables["load_balance"]["largest"].max()),
        "entropy_nats": tables["entropy"][["coarse", "fine_counts", "fine_gate"]].mean().to_dict(),
        "overlap": float(tables["overlap"]["overlap"].mean()),
        "distance": subject.distance,
        "hit_rate": {str(name): float(value) for name, value in rates["hit_rate"].items()},
        "chance": subject.chance,
        "shortcomings": shortcomings(subject),
        "trace": dict(subject.origin),
    }


# The command ------------------------------------------------------------------------------------


def subject_configs(cfg: DictConfig) -> Iterator[DictConfig]:
    """Yield, for every model and dataset asked for, a config with just that one of each."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    for group, asked in (("model", cfg.models), ("dataset", cfg.datasets)):
        unknown = [name for name in asked if name not in plain[group]]
        if unknown or not asked:
            raise UserError(f"{group}s={','.join(asked)}: choose some of {', '.join(plain[group])}")
    for model in cfg.models:
        for dataset in cfg.datasets:
            chosen = {"model": plain["model"][model], "dataset": plain["dataset"][dataset]}
            yield OmegaConf.create({**plain, **chosen})


def lacks_weights(cfg: DictConfig) -> bool:
    """Tell whether the scale model that a subject's config asks for is not there."""
    folder = SCALE_MODELS / cfg.model.name
    return str(cfg.weights) == "scale" and not (folder / "config.json").exists()


def report(cfg: DictConfig) -> None:
    """Investigate every model and dataset, print, and write the report. Raises UserError."""
    console, terminal = Console(), RichConsole(highlight=False)
    subjects = []
    for one in subject_configs(cfg):
        if lacks_weights(one):
            terminal.print(f"skipped {one.model.name} on {one.dataset.name}: no scale weights yet")
            continue
        subject = investigate(one, console)
        print_subject(subject, str(cfg.weights), terminal)
        subjects.append(subject)
    if not subjects:
        raise UserError(
            f"none of {', '.join(cfg.models)} has scale weights; train one with "
            "`python -m experiments.train.scale_models model=mixtral`, or choose other models="
        )
    terminal.print(f"report: {write_report(subjects, cfg, Path(cfg.output))}", soft_wrap=True)


@hydra.main(config_path="../../conf", config_name="routing_report", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Report; exit 2 for bad input."""
    for chatty in ("transformers", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    report(cfg)


if __name__ == "__main__":
    main()
