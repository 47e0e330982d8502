"""Report what models route: ``python -m experiments.routing_report weights=scale``.

Load balance, entropy, overlap of consecutive tokens, and how far ahead each predictor sees, for
every model and dataset, against uniform chance: tables on the terminal, and CSV, a JSON record and
pictures (figures 3a, 3b, 3c, 4, 8, 9 and 16a of the paper) in the output folder.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from experiments import routing_analysis as analysis
from experiments import routing_predictors as prediction
from experiments.console import Console
from experiments.errors import UserError
from experiments.models import SCALE_MODELS
from experiments.overheads import write_json
from experiments.records import provenance
from experiments.routing_source import kept_trace
from finemoe.offload.policy import ModelShape
from finemoe.trace import TraceError
from finemoe.trace_file import TraceReader

BAD_INPUT = 2
FAIR_SHARE_FLOOR = 0.2
"""An expert with less than a fifth of its fair share is called neglected."""
BINS = 8
NEAR = range(1, 9)
"""The prefetch distances of the tables and of figure 15."""
CHANCE = "chance"
COLUMN_INCHES = 3.4

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Subject:
    """One model on one dataset, and what its report found."""

    model: str
    dataset: str
    shape: ModelShape
    distance: int
    """The model's prefetch distance d (section 6.1)."""
    origin: Mapping[str, Any]
    """Where its routing came from, as its trace says."""
    tables: Tables


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
    distances = range(1, cfg.longest_distance + 1)
    rates = prediction.hit_rates_by_distance(named, measured, distances)
    pairs = prediction.similarity_and_hits(searched, measured, shape.top_k, distance)
    tables = {
        "balance": _balance(routed),
        "entropy": analysis.entropies(routed).assign(uniform=np.log(shape.experts)).reset_index(),
        "entropy_growth": analysis.entropy_growth(routed, cfg.entropy_iterations).reset_index(),
        "overlap": analysis.consecutive_overlap(routed)
        .assign(chance=shape.top_k / shape.experts)
        .reset_index(),
        "heatmaps": analysis.heatmaps(routed).reset_index(),
        "hit_rates": _with_chance(rates, shape),
        "similarity": _similarity(pairs),
        "correlation": _correlation(pairs),
        "capacity": prediction.capacity_scores(
            history, measured, shape, list(cfg.capacities), distance
        ),
    }
    return Subject(cfg.model.name, cfg.dataset.name, shape, distance, header.provenance, tables)


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
    parts = {"prompts": routed.at(~routed.decode), "all": routed}
    frames = {part: analysis.load_balance(chosen) for part, chosen in parts.items()}
    return pd.concat(frames, names=["tokens"]).reset_index()


def _with_chance(rates: pd.DataFrame, shape: ModelShape) -> pd.DataFrame:
    """Add what K experts drawn uniformly would hit: K/J."""
    chance = shape.top_k / shape.experts
    columns = {"predictor": CHANCE, "distance": rates["distance"].unique()}
    return pd.concat(
        [rates, pd.DataFrame(columns).assign(hit_rate=chance, low=chance, high=chance)],
        ignore_index=True,
    )


def _similarity(pairs: pd.DataFrame) -> pd.DataFrame:
    frames = {
        (search, selection): analysis.binned(
            group["score"].to_numpy(), group[selection].to_numpy(), _request(group), BINS
        )
        for search, group in pairs.groupby("search")
        for selection in ("top_k", "delta")
    }
    return pd.concat(frames, names=["search", "selection"]).reset_index()


def _correlation(pairs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for search, group in pairs.groupby("search"):
        for selection in ("top_k", "delta"):
            score, hits = group["score"].to_numpy(), group[selection].to_numpy()
            found = analysis.correlation(score, hits, _request(group))
            size = group[f"{selection}_experts"].mean()
            rows.append((search, selection, *found, score.mean(), hits.mean(), size))
    names = ["search", "selection", "pearson", "low", "high", "score", "hit_rate", "experts"]
    return pd.DataFrame(rows, columns=names)


def _request(group: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.int64]]:
    return group["request"].to_numpy()


# On the terminal --------------------------------------------------------------------------------


def print_subject(subject: Subject, weights: str, console: RichConsole) -> None:
    """Print one table of the routing and one of the predictors."""
    shape, tables = subject.shape, subject.tables
    console.print(
        f"[bold]{subject.model} on {subject.dataset}[/] ({weights} weights, "
        f"{shape.layers} x {shape.experts}, top-{shape.top_k})"
    )
    uniform = {"balance": "1.00", "entropy": f"{np.log(shape.experts):.3f}"}
    routing = _table("over layers", "mean", "least", "most", "uniform")
    for tokens, balance in tables["balance"].groupby("tokens"):
        for end in ("smallest", "largest"):
            label = f"{end} load / fair share, {tokens}"
            routing.add_row(label, *_spread(balance[end]), uniform["balance"])
    for kind, name in ENTROPIES.items():
        routing.add_row(
            f"entropy, {name} (nats)", *_spread(tables["entropy"][kind]), uniform["entropy"]
        )
    chance = f"{shape.top_k / shape.experts:.3f}"
    routing.add_row("overlap of consecutive tokens", *_spread(tables["overlap"]["overlap"]), chance)
    console.print(routing)
    rates = near_hit_rates(subject)
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


ENTROPIES = {
    "coarse": "request",
    "fine_counts": "iteration, counts",
    "fine_gate": "iteration, gate",
}


def near_hit_rates(subject: Subject) -> pd.DataFrame:
    """Return hit rates, one row a predictor (best first), one column a distance up to 8."""
    rates = subject.tables["hit_rates"]
    near = rates[rates["distance"].isin(NEAR)]
    wide = near.pivot(index="predictor", columns="distance", values="hit_rate")
    return wide.loc[wide.mean(axis=1).sort_values(ascending=False).index]


def shortcomings(subject: Subject) -> list[str]:
    """Say which layers neglect an expert, and which predictors are not clearly above chance."""
    prompts = subject.tables["balance"].query("tokens == 'prompts'")
    neglecting = prompts.loc[prompts["smallest"] < FAIR_SHARE_FLOOR, "layer"].tolist()
    rates = subject.tables["hit_rates"].query("distance == @subject.distance")
    chance = subject.shape.top_k / subject.shape.experts
    weak = rates[(rates["low"] <= chance) & (rates["predictor"] != CHANCE)]["predictor"].tolist()
    lines = [
        f"layers with an expert below a fifth of its fair share of prompt tokens: "
        f"{', '.join(map(str, neglecting)) or 'none'}",
        f"predictors not above chance at d = {subject.distance} (95 % interval): "
        f"{', '.join(weak) or 'none'}",
    ]
    return lines


def _spread(values: pd.Series[float]) -> tuple[str, str, str]:
    return f"{values.mean():.3f}", f"{values.min():.3f}", f"{values.max():.3f}"


# Files ------------------------------------------------------------------------------------------


def write_report(subjects: Sequence[Subject], cfg: DictConfig, folder: Path) -> Path:
    """Write a CSV a table and the pictures, then the record; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = joined_tables(subjects)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    draw_all(tables, f"{cfg.weights} weights", folder)
    record = {
        "config": OmegaConf.to_container(cfg, resolve=False),
        "routing": "the model's own gates",
        "subjects": [_summary(subject) for subject in subjects],
        **provenance(),
    }
    write_json(folder / "routing_report.json", record)
    return folder / "routing_report.json"


def joined_tables(subjects: Sequence[Subject]) -> Tables:
    """Return each table over all subjects, with columns model and dataset in front."""
    names = subjects[0].tables
    keys = [(subject.model, subject.dataset) for subject in subjects]
    return {
        name: pd.concat([s.tables[name] for s in subjects], keys=keys, names=["model", "dataset"])
        .reset_index(["model", "dataset"])
        .reset_index(drop=True)
        for name in names
    }


def _summary(subject: Subject) -> dict[str, Any]:
    """Return means over layers, hit rates at d and correlations; NaN, where undefined, as null."""
    tables, shape = subject.tables, subject.shape
    prompts = tables["balance"].query("tokens == 'prompts'")
    rates = tables["hit_rates"].query("distance == @subject.distance").set_index("predictor")
    correlations = tables["correlation"].replace(np.nan, None)
    return {
        "model": subject.model,
        "dataset": subject.dataset,
        "layers": shape.layers,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "smallest_load": float(prompts["smallest"].min()),
        "largest_load": float(prompts["largest"].max()),
        "entropy_nats": {kind: float(tables["entropy"][kind].mean()) for kind in ENTROPIES},
        "overlap": float(tables["overlap"]["overlap"].mean()),
        "distance": subject.distance,
        "hit_rate": {str(name): float(value) for name, value in rates["hit_rate"].items()},
        "correlation": correlations.to_dict("records"),
        "shortcomings": shortcomings(subject),
        "trace": dict(subject.origin),
    }


# Pictures ---------------------------------------------------------------------------------------


def draw_all(tables: Tables, weights: str, folder: Path) -> None:
    """Draw every figure as PNG and PDF, one column of a paper wide."""
    matplotlib.use("Agg")
    rc = {"pdf.fonttype": 42, "axes.titlepad": 3, "lines.markersize": 3, "legend.fontsize": 6.5}
    sns.set_theme("paper", "ticks", "colorblind", font_scale=0.75, rc=rc)
    rates = tables["hit_rates"]
    pictures = {
        "hit_rates": _rates_picture(rates[rates["distance"].isin(NEAR)]),
        "figure4_hit_rate_by_distance": _rates_picture(
            rates[rates["predictor"].isin(["request counts", "map, trajectory", CHANCE])]
        ),
        "load_balance": _balance_picture(tables["balance"]),
        "overlap": _overlap_picture(tables["overlap"]),
        "figure3b_entropy": _entropy_picture(tables["entropy"]),
        "figure3c_entropy_growth": _growth_picture(tables["entropy_growth"]),
        "figure8_hit_rate_by_similarity": _similarity_picture(tables["similarity"]),
        "figure9_pearson": _pearson_picture(tables["correlation"]),
        "figure16a_capacity": _capacity_picture(tables["capacity"]),
    }
    for model, heat in tables["heatmaps"].groupby("model", sort=False):
        pictures[f"figure3a_heatmaps_{model}"] = _heat_picture(heat)
    for name, figure in pictures.items():
        figure.suptitle(weights, fontsize=6, x=0.99, y=1.0, ha="right", va="bottom", color="0.4")
        for suffix in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=300, bbox_inches="tight")
        plt.close(figure)


def _grid(data: pd.DataFrame, height: float = 1.5, **layout: Any) -> sns.FacetGrid:
    """Return panels, models down and datasets across, one column of a paper wide."""
    facets = {"row": "model", "col": "dataset", **layout}
    across = data[facets["col"]].nunique()
    aspect = COLUMN_INCHES / across / height
    return sns.FacetGrid(data, height=height, aspect=aspect, margin_titles=False, **facets)


def _finished(grid: sns.FacetGrid, columns: int = 3, title: str | None = None) -> Any:
    """Label the panels, put the legend below and return the figure."""
    rows = grid.row_names and grid._row_var is not None
    grid.set_titles(title or ("{row_name}, {col_name}" if rows else "{col_name}"))
    figure = grid.figure
    handles, labels = grid.axes.flat[0].get_legend_handles_labels()
    figure.tight_layout(pad=0.3, w_pad=0.8, h_pad=0.8)
    if handles:
        figure.legend(
            handles, labels, ncol=columns, loc="upper center", bbox_to_anchor=(0.5, 0.0),
            frameon=False, columnspacing=1.0, handlelength=1.8,
        )  # fmt: skip
    return figure


def _rates_picture(rates: pd.DataFrame) -> Any:
    grid = _grid(rates)
    names = [name for name in rates["predictor"].unique() if name != CHANCE]
    for (row, column, _), panel in grid.facet_data():
        axes = grid.axes[row, column]
        for name, colour in zip(names, sns.color_palette(), strict=False):
            one = panel[panel["predictor"] == name]
            marker = "o" if len(one) <= len(NEAR) else ""
            axes.plot(one["distance"], one["hit_rate"], marker=marker, label=name, color=colour)
            axes.fill_between(one["distance"], one["low"], one["high"], alpha=0.15, lw=0)
        chance = panel.loc[panel["predictor"] == CHANCE, "hit_rate"].iloc[0]
        axes.axhline(chance, ls="--", color="0.4", lw=1, label=CHANCE)
    grid.set(ylim=(0, 1)).set_axis_labels("prefetch distance d", "hit rate")
    return _finished(grid)


def _balance_picture(balance: pd.DataFrame) -> Any:
    grid = _grid(balance[balance["tokens"] == "prompts"])
    for end, colour in zip(("largest", "smallest"), sns.color_palette(), strict=False):
        grid.map_dataframe(sns.lineplot, "layer", end, label=f"{end} load", color=colour)
    grid.refline(y=1, color="0.4", lw=1).refline(y=FAIR_SHARE_FLOOR, color="0.7", lw=1)
    grid.set(ylim=(0, None)).set_axis_labels("layer", "load / fair share")
    return _finished(grid)


def _overlap_picture(overlap: pd.DataFrame) -> Any:
    grid = _grid(overlap, height=1.5, row=None, hue="model", palette="colorblind")
    grid.map(sns.lineplot, "layer", "overlap").map(_dashed, "layer", "chance")
    grid.set(ylim=(0, 1)).set_axis_labels("layer", "overlap of\nconsecutive tokens")
    return _finished(grid)


def _dashed(x: Any, y: Any, color: Any, label: str) -> None:
    plt.plot(x, y, color=color, ls="--", lw=0.8)


def _entropy_picture(entropy: pd.DataFrame) -> Any:
    named = entropy.rename(columns={**ENTROPIES, "uniform": "uniform, ln J"})
    long = named.melt(["model", "dataset", "layer"], var_name="entropy", value_name="nats")
    grid = _grid(long, height=1.6, row=None)
    style = {"hue": "entropy", "palette": "colorblind", "errorbar": None, "saturation": 1}
    grid.map_dataframe(sns.barplot, "model", "nats", **style)
    grid.set_axis_labels("", "mean entropy (nats)")
    return _finished(grid, columns=2)


def _growth_picture(growth: pd.DataFrame) -> Any:
    grid = _grid(growth, height=1.5, row=None, hue="model", palette="colorblind")
    grid.map(sns.lineplot, "iterations", "entropy")
    grid.set(ylim=(0, None)).set_axis_labels("iterations", "entropy (nats)")
    return _finished(grid)


def _similarity_picture(similarity: pd.DataFrame) -> Any:
    shown = similarity[similarity["selection"] == "top_k"]
    grid = _grid(shown, height=1.5, row="dataset", col="search", hue="model", sharex="col")
    grid.map(_with_bars, "score", "hit_rate", "low", "high")
    grid.set(ylim=(0, 1)).set_axis_labels("similarity score", "hit rate")
    return _finished(grid, title="{col_name}, {row_name}")


def _with_bars(x: Any, y: Any, low: Any, high: Any, **style: Any) -> None:
    errors = np.maximum([y - low, high - y], 0)
    plt.errorbar(x, y, errors, marker="o", lw=1, elinewidth=0.7, **style)


def _pearson_picture(correlations: pd.DataFrame) -> Any:
    shown = correlations[correlations["selection"] == "top_k"]
    grid = _grid(shown, height=1.6, row=None)
    models = shown["model"].unique().tolist()
    for (_, column, _), panel in grid.facet_data():
        axes = grid.axes[0, column]
        for place, (search, group) in enumerate(panel.groupby("search")):
            x = [models.index(model) + 0.36 * (place - 0.5) for model in group["model"]]
            errors = np.maximum(
                [group["pearson"] - group["low"], group["high"] - group["pearson"]], 0
            )
            axes.bar(x, group["pearson"], 0.36, yerr=errors, label=search, error_kw={"lw": 0.8})
        axes.axhline(0, color="0.4", lw=0.8)
        axes.set_xticks(range(len(models)), models)
    grid.set_axis_labels("", "Pearson coefficient")
    return _finished(grid)


def _capacity_picture(capacity: pd.DataFrame) -> Any:
    grid = _grid(capacity)
    for search, colour in zip(("semantic", "trajectory"), sns.color_palette(), strict=False):
        style = {"marker": "o", "label": search, "color": colour}
        grid.map_dataframe(sns.lineplot, "capacity", search, **style)
    grid.set_axis_labels("store capacity", "mean score")
    return _finished(grid)


def _heat_picture(heat: pd.DataFrame) -> Any:
    """Draw the request and one of its iterations on the first dataset, layers down."""
    first = heat[heat["dataset"] == heat["dataset"].iloc[0]]
    figure, axes = plt.subplots(
        1, 2, figsize=(COLUMN_INCHES, 2.4), sharey=True, layout="constrained"
    )
    names = {"coarse": "request, counts", "fine": "iteration, gate"}
    for panel, (kind, name) in zip(axes, names.items(), strict=True):
        shares = first.pivot(index="layer", columns="expert", values=kind)
        sns.heatmap(shares, ax=panel, cmap="rocket_r", vmin=0, yticklabels=4)
        panel.set(title=name, ylabel="layer" if kind == "coarse" else "")
    return figure


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
            "`python -m experiments.scale_models model=mixtral`, or choose other models="
        )
    terminal.print(f"report: {write_report(subjects, cfg, Path(cfg.output))}", soft_wrap=True)


@hydra.main(config_path="../conf", config_name="routing_report", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Report; exit 2 for bad input."""
    for chatty in ("transformers", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        report(cfg)
    except (UserError, TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


if __name__ == "__main__":
    main()
