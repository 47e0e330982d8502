"""Report what models route: ``python -m experiments.reproduce.routing_report weights=scale``.

Load balance, entropy, overlap of consecutive tokens, and how far ahead each predictor sees, for
every model and dataset, against uniform chance: on the terminal, as pictures and as a JSON record.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments import style
from experiments.errors import UserError, command
from experiments.figures import analyses, charts, routing
from experiments.figures.figure4 import rate_panels
from experiments.run.console import Console
from experiments.run.records import provenance
from experiments.run.routing import kept_trace
from finemoe.files import write_json
from finemoe.trace import TraceReader

FAIR_SHARE_FLOOR = 0.2  # an expert with less than a fifth of its fair share is called neglected
DISTANCES = range(1, 9)  # the prefetch distances of figure 15

Summary = dict[str, Any]
Tables = dict[str, pd.DataFrame]


def investigate(cfg: DictConfig, console: Console) -> tuple[Summary, Tables]:
    """Return the routing of `cfg.model` on `cfg.dataset` as a record says it, and as tables.

    It is recorded unless its trace was kept. `cfg` is what `subject_configs` yields. Raises
    UserError or TraceError.
    """
    cut = analyses.history_length(cfg.workload.history_share, cfg.workload.prompts)
    if cfg.workload.output_tokens < 3:
        raise UserError("workload.output_tokens below 3 leaves no decoded tokens to compare")
    with TraceReader(kept_trace(cfg, console)) as reader:
        header, routed = reader.header, routing.iterations(reader.requests())
    history, measured = routed.at(routed.request < cut), routed.at(routed.request >= cut)
    shape, distance = header.shape, min(cfg.model.prefetch_distance, header.shape.layers - 1)
    searched = routing.search(history, measured, shape, cfg.store_capacity, distance)
    named = routing.predictors(history, measured, searched, header.gates, shape.top_k)
    chance = shape.top_k / shape.experts
    balance = routing.load_balance(routed.at(~routed.decode))
    balance = balance.join(routing.load_balance(routed).add_suffix("_all"))
    tables = {
        "load_balance": _by_layer(balance, 1.0),
        "entropy": _by_layer(routing.entropies(routed), float(np.log(shape.experts))),
        "overlap": _by_layer(routing.consecutive_overlap(routed), chance),
        "hit_rates": routing.hit_rates_by_distance(named, measured, DISTANCES),
    }
    tables["hit_rates"]["chance"] = chance
    at_distance = tables["hit_rates"].query("distance == @distance").set_index("predictor")
    smallest, lowest = balance["smallest"], at_distance["low"]
    neglecting = ", ".join(smallest.index[smallest < FAIR_SHARE_FLOOR].astype(str)) or "none"
    weak = ", ".join(lowest.index[lowest <= chance]) or "none"
    summary = {
        "model": cfg.model.name,
        "dataset": cfg.dataset.name,
        "weights": header.provenance.get("weights", "unknown"),
        "requests": routed.requests,
        "measured_requests": routed.requests - cut,
        "layers": shape.layers,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "smallest_load": float(smallest.min()),
        "largest_load": float(balance["largest"].max()),
        "entropy_nats": tables["entropy"][["coarse", "fine_counts", "fine_gate"]].mean().to_dict(),
        "overlap": float(tables["overlap"]["overlap"].mean()),
        "distance": distance,
        "hit_rate": at_distance["hit_rate"].to_dict(),
        "chance": chance,
        "shortcomings": [
            f"layers with an expert below a fifth of its fair share of prompt tokens: {neglecting}",
            f"predictors not above chance at d = {distance} (95 % interval): {weak}",
        ],
        "trace": dict(header.provenance),
    }
    return summary, tables


def _by_layer(table: pd.DataFrame, uniform: float) -> pd.DataFrame:
    return table.assign(uniform=uniform).rename_axis("layer").reset_index()


def print_subject(summary: Summary, tables: Tables, weights: str) -> None:
    """Print one table of the routing and one of the predictors, the best first."""
    print(
        f"\n{summary['model']} on {summary['dataset']} ({weights} weights, "
        f"{summary['layers']} x {summary['experts']}, top-{summary['top_k']})\n"
    )
    layers = {
        name: tables[name].drop(columns="layer").agg(["mean", "min", "max"]).T for name in PICTURES
    }
    print(pd.concat(layers, names=["over layers"]).to_string(float_format="{:.3f}".format))
    rates = tables["hit_rates"].pivot(index="predictor", columns="distance", values="hit_rate")
    rates.loc["chance"] = summary["chance"]
    best = rates.mean(axis=1).sort_values(ascending=False).index
    rates = rates.loc[best].rename_axis(index=None, columns="hit rate at d =")
    print("", rates.to_string(float_format="{:.3f}".format), *summary["shortcomings"], sep="\n")


# Of no model, no system and no granularity.
_LINE = {"color": "#6A51A3", "marker": "", "linestyle": "-"}
_COARSE, _FINE = charts.unmarked(style.GRANULARITIES).values()
_DOTTED = {"linestyle": ":"}
PICTURES: dict[str, tuple[str, str, dict[str, tuple[str, style.Look]], str]] = {
    "load_balance": (
        "Load of experts by layer",
        "Load / fair share",
        {
            "largest": ("Most used", _LINE),
            "smallest": ("Least used", {**_LINE, **_DOTTED}),
            "uniform": ("Fair share", style.CHANCE),
        },
        "Share of the prompts' tokens that the most and the least used expert of a layer got, over "
        "the share 1/J that each would get of equal ones.",
    ),
    "entropy": (
        "Entropy by layer",
        style.METRICS["nats"][0],
        {
            "coarse": ("Coarse, counts", _COARSE),
            "fine_gate": ("Fine, gate", _FINE),
            "fine_counts": ("Fine, counts", {**_FINE, **_DOTTED}),
            "uniform": ("Uniform (ln J)", style.CHANCE),
        },
        "Of the activation counts of a whole request (coarse), and of the gate probabilities and "
        "the counts of one decode iteration (fine), means over requests or iterations; the counts "
        "of an iteration give ln K by construction.",
    ),
    "overlap": (
        "Overlap of consecutive tokens by layer",
        "Share of experts in common",
        {"overlap": ("Overlap", _LINE), "uniform": ("Chance (K/J)", style.CHANCE)},
        "Share of a decoded token's experts that the token before it used as well.",
    ),
}
"""Table to title, vertical label, columns drawn (name and look), and what the picture shows."""
# Of the colours of systems, a predictor has that of the one which predicts so.
PREDICTORS: dict[str, style.Look] = {
    "popularity": {"color": "#0072B2", "marker": "X", "linestyle": "-"},
    "request counts": style.GRANULARITIES["Coarse"],
    "previous token": {"color": "#CC79A7", "marker": "^", "linestyle": "-"},
    "target gate": {"color": "#E69F00", "marker": "D", "linestyle": "-"},
    "map, semantic": {**style.SEARCHES["Semantic"], "marker": "v"},
    "map, trajectory": style.SEARCHES["Trajectory"],
}
PREDICTORS_SHOW = (
    "Share of a decoded token's experts that were among the K predicted d layers before, by: "
    "the experts that the history used most (popularity); the past request of nearest "
    "activation counts; the request's previous token; the layer's own gate, given the hidden "
    "state of d layers before (target gate); the past iteration of nearest embedding (map, "
    "semantic) or of nearest gate outputs up to then (map, trajectory). "
    "Bands: 95 % bootstrap intervals over requests."
)


def draw_tables(tables: Tables, summaries: Sequence[Summary], output: Path) -> None:
    """Draw every table of all subjects as `<output>/<name>`, its data beside it."""
    record = {"label": "Routing report", "mode": analyses.MODE, "subjects": summaries}
    for name, (title, label, columns, shows) in PICTURES.items():
        with charts.model_panels(tables[name], "Layer", label) as (figure, panels):
            top = tables[name][list(columns)].to_numpy().max() * 1.05
            for axes, rows in panels:
                for column, (_, look) in columns.items():
                    width = 0.8 if column == "uniform" else 1.2
                    line = {"c": look["color"], "ls": look["linestyle"], "lw": width}
                    axes.plot(rows["layer"], rows[column], **line)
                axes.set(ylim=(0, top), xlim=(0, tables[name]["layer"].max()))
            charts.legend(figure, dict(columns.values()), columns=2 if len(columns) == 4 else 3)
            named = {**record, "id": name, "title": title}
            analyses.save(figure, output, named, tables[name], shows, split=False)
    rates = tables["hit_rates"]
    looks = {name: look for name, look in PREDICTORS.items() if name in set(rates["predictor"])}
    with rate_panels(rates, "predictor", looks) as figure:
        named = {**record, "id": "hit_rates", "title": "Expert hit rate of predictors"}
        analyses.save(figure, output, named, rates, PREDICTORS_SHOW)


def subject_configs(cfg: DictConfig) -> Iterator[DictConfig]:
    """Yield, for every model and dataset asked for, a config with just that one of each."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    for group, asked in (("model", cfg.models), ("dataset", cfg.datasets)):
        if not asked or set(asked) - set(plain[group]):
            raise UserError(f"{group}s={','.join(asked)}: choose some of {', '.join(plain[group])}")
    for model, dataset in product(cfg.models, cfg.datasets):
        chosen = {"model": plain["model"][model], "dataset": plain["dataset"][dataset]}
        yield OmegaConf.create({**plain, **chosen})


def report(cfg: DictConfig) -> None:
    """Investigate every model and dataset, print, and write the report. Raises UserError."""
    summaries, found = list[Summary](), dict[tuple[str, str], Tables]()
    for one in subject_configs(cfg):
        summary, tables = investigate(one, Console())
        print_subject(summary, tables, str(cfg.weights))
        summaries.append(summary)
        found[one.model.name, one.dataset.name] = tables
    tables = {
        name: analyses.joined({subject: one[name] for subject, one in found.items()})
        for name in (*PICTURES, "hit_rates")
    }
    draw_tables(tables, summaries, Path(cfg.output))
    record = {
        "config": OmegaConf.to_container(cfg, resolve=False),
        "routing": "the model's own gates",
        "subjects": summaries,
        **provenance(),
    }
    write_json(Path(cfg.output) / "routing_report.json", record)
    print(f"report: {cfg.output}/routing_report.json")


@hydra.main(config_path="../../conf", config_name="routing_report", version_base="1.3")
@command()
def main(cfg: DictConfig) -> None:
    """Report; exit 2 for bad input."""
    for chatty in ("transformers", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    report(cfg)


if __name__ == "__main__":
    main()
