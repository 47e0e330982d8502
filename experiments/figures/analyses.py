"""Analyses of routing traces: a CSV file and `record.json` in a folder, from which to draw."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from experiments import CONF
from experiments.errors import UserError
from experiments.figures import charts, routing
from experiments.run.records import ANALYSIS, provenance, read_checked, read_table
from finemoe.files import write_csv, write_json
from finemoe.offload.policy import ModelShape
from finemoe.trace import TraceReader

MODE = "analysis of routing traces"
FACTS_MODE = "computed from the models' published shapes"
KEPT = 6  # traces that a process keeps: three models on two datasets

Traces = Mapping[tuple[str, str], Path]  # of a model and a dataset
Analysis = Callable[[DictConfig, Traces, Path], None]


@dataclass(frozen=True)
class Subject:
    """One model on one dataset; the first requests of its trace are history, as in runs (6.1)."""

    model: str
    dataset: str
    shape: ModelShape
    origin: Mapping[str, Any]  # where its trace comes from
    routed: routing.Iterations
    distance: int  # d of the model, below its number of layers
    cut: int  # how many requests are history

    @property
    def history(self) -> routing.Iterations:
        return self.routed.at(self.routed.request < self.cut)

    @property
    def measured(self) -> routing.Iterations:
        return self.routed.at(self.routed.request >= self.cut)

    def searched(self, capacity: int) -> routing.Searched:
        """Return what a store of `capacity`, filled with the history, says to the measured."""
        return routing.search(self.history, self.measured, self.shape, capacity, self.distance)

    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dataset": self.dataset,
            "weights": self.origin.get("weights", "unknown"),
            **asdict(self.shape),
            "distance": self.distance,
            "requests": self.routed.requests,
            "history_requests": self.cut,
            "measured_requests": self.routed.requests - self.cut,
            "decode_iterations": int(self.routed.decode.sum()),
            "trace": dict(self.origin),
        }


@lru_cache(maxsize=KEPT)
def read_routing(path: Path) -> tuple[ModelShape, Mapping[str, Any], routing.Iterations]:
    """Return what a trace holds, and where it came from. Raises TraceError; ValueError if empty."""
    with TraceReader(path) as reader:
        routed = routing.iterations(reader.requests())
        return reader.header.shape, reader.header.provenance, routed


def subjects(cfg: DictConfig, traces: Traces) -> Iterator[Subject]:
    """Yield every model on every dataset of `cfg.experiment`; UserError for a missing trace."""
    for model, dataset in product(cfg.experiment.models, cfg.experiment.datasets):
        if (model, dataset) not in traces:
            raise UserError(f"no routing trace of {model} on {dataset}; record it first")
        shape, origin, routed = read_routing(traces[model, dataset])
        share, requests = cfg.workload.history_share, routed.requests
        cut = round(share * requests)
        if not 0 < cut < requests:
            cause = f"workload.history_share={share} of {requests} requests leaves no history"
            raise UserError(f"{cause}, or none to measure; change it or add prompts")
        distance = max(1, min(model_facts(model).prefetch_distance, shape.layers - 1))
        yield Subject(model, dataset, shape, origin, routed, distance, cut)


def model_facts(name: str) -> DictConfig:
    """Return conf/model/<name>.yaml; raise UserError if there is none."""
    models = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "model").glob("*.yaml"))}
    # One has no facts of its own: any checkpoint's.
    known = {stem: DictConfig(facts) for stem, facts in models.items() if facts.name}
    if name not in known:
        raise UserError(f"no model {name!r}; choose some of {', '.join(known)}")
    return known[name]


def of_traces(table: Callable[[Subject, DictConfig], pd.DataFrame]) -> Analysis:
    """Make an analysis, of all subjects, of a function of one and of `cfg.experiment`."""

    def analyse(cfg: DictConfig, traces: Traces, folder: Path) -> None:
        listed = list(subjects(cfg, traces))
        tables = {(each.model, each.dataset): table(each, cfg.experiment) for each in listed}
        both = pd.concat(tables, names=["model", "dataset"]).reset_index(["model", "dataset"])
        _write(cfg, folder, table.__name__, both, listed)

    return analyse


def of_models(rows: Callable[[str, DictConfig], Iterator[dict[str, Any]]]) -> Analysis:
    """The same of a function that yields the rows of one model by its name, without traces."""

    def analyse(cfg: DictConfig, traces: Traces, folder: Path) -> None:
        table = [row for name in cfg.experiment.models for row in rows(name, cfg.experiment)]
        _write(cfg, folder, rows.__name__, pd.DataFrame(table), [])

    return analyse


def _write(
    cfg: DictConfig, folder: Path, name: str, table: pd.DataFrame, listed: Sequence[Subject]
) -> None:
    """Write <name>.csv, then the record; its rename makes the analysis complete. Raises OSError."""
    experiment: Any = OmegaConf.to_container(cfg.experiment, resolve=True)
    identity = experiment["id"]
    kind = "Table" if "table" in identity else "Figure"
    record = {
        "id": identity,
        "label": f"{kind} {identity.removeprefix('table')}",
        "title": experiment["title"],
        "mode": MODE if listed else FACTS_MODE,
        "experiment": experiment,
        "history_share": cfg.workload.history_share if listed else None,
        "subjects": [subject.facts() for subject in listed],
        "tables": [name],
        "provenance": provenance(),
    }
    write_csv(folder / f"{name}.csv", table)
    write_json(folder / "record.json", record)


def read_analysis(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return the record and the table of an analysis; UserError if it is not there or not whole."""
    record = read_checked(folder / "record.json", ANALYSIS, "complete analysis", "run it again")
    (name,) = record["tables"]
    return record, read_table(folder / f"{name}.csv")


def save(
    figure: Figure,
    output: Path,
    record: Mapping[str, Any],
    table: pd.DataFrame,
    shows: str | None,
    split: bool = True,
) -> None:
    """Save a figure of a table; `split`: requests were split into history and measured ones."""
    table = table.drop(columns="series", errors="ignore")
    caption = f"{record['label']}: {record['title']}. {shows} Mode: {record['mode']}"
    if record["subjects"]:
        listed = pd.DataFrame(list(record["subjects"]))
        numbers = (listed[column].unique() for column in ("requests", "measured_requests"))
        total, measured = (", ".join(map(str, one)) for one in numbers)
        counted = f" ({measured} measured, the others history)" if split else ""
        origin = charts.served(listed, " of the real models' routing shapes")
        caption += f"; {origin}; n = {total} requests{counted} of each model and dataset"
    charts.write(figure, table, output, record["id"], f"{caption}.")
