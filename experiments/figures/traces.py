"""What the analyses of routing traces share: the traces they read and the record they leave.

An analysis reads what some models routed on some datasets, and leaves CSV files and `record.json`
in a folder; a picture is drawn from that folder alone. All has one mode, so that the `mixed_modes`
of figures of runs has nothing to say here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from experiments import CONF
from experiments.errors import UserError
from experiments.figures import charts, style
from experiments.figures import routing_analysis as analysis
from experiments.figures import routing_predictors as prediction
from experiments.figures.style import MODEL_COLOURS, MODELS, model_name
from experiments.run.records import ANALYSIS, provenance, read_checked, read_table
from finemoe.files import atomic_write
from finemoe.offload.policy import ModelShape
from finemoe.trace import TracedRequest, TraceReader

MODE = "analysis of routing traces"
FACTS_MODE = "computed from the models' published shapes"
RECORD = "record.json"
MODEL_CONFIGS = CONF / "model"
KEPT = 6
"""Three models on two datasets: what one process keeps, so that it reads each trace once."""

Traces = Mapping[tuple[str, str], Path]


@dataclass(frozen=True)
class Routing:
    """What a trace holds, hidden states left out."""

    shape: ModelShape
    origin: Mapping[str, Any]
    """Where the routing came from, as the trace says."""
    iterations: analysis.Iterations


@dataclass(frozen=True)
class Subject:
    """One model on one dataset; the first requests of its trace are history, as in runs (6.1)."""

    model: str
    dataset: str
    path: Path
    distance: int
    """The model's prefetch distance d, below its number of layers."""
    cut: int
    """How many requests are history."""

    @property
    def routing(self) -> Routing:
        return read_routing(self.path)

    @property
    def shape(self) -> ModelShape:
        return self.routing.shape

    @property
    def history(self) -> analysis.Iterations:
        return self._part(measured=False)

    @property
    def measured(self) -> analysis.Iterations:
        return self._part(measured=True)

    def searched(self, capacity: int) -> prediction.Searched:
        """Return what a store of `capacity`, filled with the history, says to the measured."""
        part = self.history, self.measured
        return prediction.search(*part, self.shape, capacity, self.distance)

    def facts(self) -> dict[str, Any]:
        """Return what a record says about this subject."""
        routed = self.routing.iterations
        requests = int(routed.request[-1]) + 1
        return {
            "model": self.model,
            "dataset": self.dataset,
            "weights": self.routing.origin.get("weights", "unknown"),
            **asdict(self.shape),
            "distance": self.distance,
            "requests": requests,
            "history_requests": self.cut,
            "measured_requests": requests - self.cut,
            "decode_iterations": int(routed.decode.sum()),
            "trace": dict(self.routing.origin),
        }

    def _part(self, measured: bool) -> analysis.Iterations:
        routed = self.routing.iterations
        return routed.at((routed.request >= self.cut) == measured)


@lru_cache(maxsize=KEPT)
def read_routing(path: Path) -> Routing:
    """Return what a trace holds. Raises TraceError; ValueError if it holds no request."""
    with TraceReader(path) as reader:
        # Request by request, or the hidden states of a full-size model would not fit.
        parts = [_routed(number, one) for number, one in enumerate(reader.requests())]
        header = reader.header
    if not parts:
        raise ValueError(f"{path} holds no request; record at least one")
    names = [one.name for one in fields(analysis.Iterations)]
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    return Routing(header.shape, header.provenance, analysis.Iterations(*joined))


def _routed(number: int, request: TracedRequest) -> analysis.Iterations:
    routed = analysis.iterations([request])
    numbers = np.full(len(routed.decode), number)
    return replace(routed, request=numbers, hidden_states=routed.hidden_states[..., :0])


def subjects(cfg: DictConfig, traces: Traces) -> Iterator[Subject]:
    """Yield what `cfg.experiment` lists: every model of `models` on every dataset of `datasets`.

    Raises UserError if a trace is missing, or has no history or nothing else.
    """
    share = cfg.workload.history_share
    for model, dataset in product(cfg.experiment.models, cfg.experiment.datasets):
        if (model, dataset) not in traces:
            raise UserError(f"no routing trace of {model} on {dataset}; record it first")
        path = traces[model, dataset]
        routing = read_routing(path)
        requests = int(routing.iterations.request[-1]) + 1
        cut = round(share * requests)
        if not 0 < cut < requests:
            raise UserError(
                f"workload.history_share={share} of {requests} requests leaves no history, or none "
                "to measure; change it or add prompts"
            )
        asked = int(model_facts(model).prefetch_distance)
        yield Subject(model, dataset, path, max(1, min(asked, routing.shape.layers - 1)), cut)


@lru_cache(maxsize=KEPT)
def similarity_pairs(subject: Subject, capacity: int) -> pd.DataFrame:
    """Return score and hit rate of every measured decode iteration (figures 8 and 9)."""
    searched, top_k = subject.searched(capacity), subject.shape.top_k
    return prediction.similarity_and_hits(searched, subject.measured, top_k, subject.distance)


# Facts of the real models -------------------------------------------------------------------------


def model_facts(name: str) -> DictConfig:
    """Return conf/model/<name>.yaml; raise UserError if there is none."""
    path = MODEL_CONFIGS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(one.stem for one in MODEL_CONFIGS.glob("*.yaml")))
        raise UserError(f"no model {name!r}; choose some of {known}")
    facts = OmegaConf.load(path)
    assert isinstance(facts, DictConfig)
    return facts


# What an analysis leaves --------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysed:
    """What an analysis left in its folder."""

    record: Mapping[str, Any]
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    def save(self, figure: Figure, place: Path, what: str, split: bool = True) -> style.Drawn:
        """Save a figure of the whole table, with the caption that `what` and `split` make."""
        caption = self.caption(what, split)
        return style.save(figure, self.table, place, self.record["id"], caption)

    def caption(self, what: str, split: bool = True) -> str:
        """Return title, `what` is drawn, mode, weights, datasets and numbers of requests.

        `split`: whether requests were split into history and measured ones.
        """
        head = f"{self.record['label']}: {self.record['title']}. {what} Mode: {self.record['mode']}"
        if not self.record["subjects"]:
            return f"{head}."
        found = pd.DataFrame(list(self.record["subjects"]))
        total, measured = (
            ", ".join(map(str, found[one].unique())) for one in ("requests", "measured_requests")
        )
        counted = f" ({measured} measured, the others history)" if split else ""
        origin = charts.served(found, " of the real models' routing shapes")
        return f"{head}; {origin}; n = {total} requests{counted} of each model and dataset."


def analyse(
    cfg: DictConfig,
    traces: Traces,
    folder: Path,
    name: str,
    table: Callable[[Subject], pd.DataFrame],
) -> None:
    """Leave the tables of all subjects as one, <name>.csv, with columns model and dataset first.

    Raises UserError, as `subjects` and `write_analysis` do.
    """
    found = list(subjects(cfg, traces))
    keyed = [table(one).assign(model=one.model, dataset=one.dataset) for one in found]
    joined = pd.concat(keyed, ignore_index=True)
    others = [column for column in joined.columns if column not in ("model", "dataset")]
    write_analysis(cfg, folder, name, joined[["model", "dataset", *others]], found)


def write_analysis(
    cfg: DictConfig, folder: Path, name: str, table: pd.DataFrame, found: Sequence[Subject] = ()
) -> None:
    """Write <name>.csv, then the record; its rename makes the analysis complete.

    Raises UserError if the folder cannot be written to.
    """
    experiment: Any = OmegaConf.to_container(cfg.experiment, resolve=True)
    identity = experiment["id"]
    kind = "Table" if "table" in identity else "Figure"
    record = {
        "id": identity,
        "label": f"{kind} {identity.removeprefix('table')}",
        "title": experiment["title"],
        "mode": MODE if found else FACTS_MODE,
        "experiment": experiment,
        "history_share": cfg.workload.history_share if found else None,
        "subjects": [one.facts() for one in found],
        "tables": [name],
        "provenance": provenance(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)
        with atomic_write(folder / RECORD) as partial:
            partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder for the results"
        ) from error


def read_analysis(folder: Path) -> Analysed:
    """Return what an analysis left; raise UserError if it is not there or not whole."""
    record = read_checked(folder / RECORD, ANALYSIS, "complete analysis; run it again")
    (name,) = record["tables"]
    return Analysed(record, read_table(folder / f"{name}.csv"))


# What the pictures share --------------------------------------------------------------------------

WHISKER: charts.Look = {"elinewidth": 0.7, "capsize": 1.5, "capthick": 0.7, "ecolor": "#333333"}
GRANULARITIES: Mapping[str, charts.Look] = {
    "Coarse": {"color": "#999999", "marker": "s", "linestyle": "-", "hatch": ""},
    "Fine": {"color": "#D55E00", "marker": "o", "linestyle": "-", "hatch": ""},
}
SEARCHES: Mapping[str, charts.Look] = {
    "Semantic": {"color": "#56B4E9", "marker": "s", "linestyle": "-", "hatch": ""},
    "Trajectory": {"color": "#D55E00", "marker": "o", "linestyle": "-", "hatch": ""},
}
# Of the colours of systems, a predictor has that of the one which predicts so.
PREDICTORS: Mapping[str, charts.Look] = {
    "popularity": {"color": "#0072B2", "marker": "X", "linestyle": "-"},
    "request counts": GRANULARITIES["Coarse"],
    "previous token": {"color": "#CC79A7", "marker": "^", "linestyle": "-"},
    "target gate": {"color": "#E69F00", "marker": "D", "linestyle": "-"},
    "map, semantic": {**SEARCHES["Semantic"], "marker": "v"},
    "map, trajectory": SEARCHES["Trajectory"],
}
CHANCE: charts.Look = {"color": "#333333", "marker": "", "linestyle": "--"}
MARKERS = ("o", "s", "^", "D", "v")


def model_looks(models: Sequence[str]) -> dict[str, charts.Look]:
    """Return colour, marker and line of each model; a known model has its own everywhere."""
    known = [*MODELS, *(one for one in models if one not in MODELS)]
    return {
        model: {
            "color": MODEL_COLOURS.get(model, "#666666"),
            "marker": MARKERS[known.index(model) % len(MARKERS)],
            "linestyle": "-",
        }
        for model in models
    }


def model_legend(figure: Figure, looks: Mapping[str, charts.Look]) -> None:
    """Name models by their lines above all panels."""
    charts.legend(figure, {model_name(model): look for model, look in looks.items()}, "line")


def unmarked(looks: Mapping[str, charts.Look]) -> dict[str, charts.Look]:
    """Return looks of lines without markers."""
    return {name: {**look, "marker": ""} for name, look in looks.items()}


def apart(figure: Figure) -> None:
    """Leave room between panels, so that outer tick labels of neighbours do not meet."""
    figure.set_layout_engine("constrained", wspace=0.06)


@contextmanager
def panels(
    rows: Sequence[str],
    columns: Sequence[str],
    height: float,
    labels: tuple[str, str],
    panel: Callable[[Axes, str, str], None],
) -> Iterator[Figure]:
    """Yield a figure where `panel` drew each of `rows` (down) and `columns` (across).

    `labels` are those of the horizontal and the vertical axes, said once, as are scales.
    """
    with style.canvas(len(rows), len(columns), style.COLUMN_INCHES, height) as figure:
        for axes, (row, column) in zip(figure.axes, product(rows, columns), strict=True):
            panel(axes, row, column)
            axes.tick_params(labelleft=column == columns[0], labelbottom=row == rows[-1])
        figure.supxlabel(labels[0], fontsize=style.POINTS)
        figure.supylabel(labels[1], fontsize=style.POINTS)
        apart(figure)
        yield figure


def model_panels(
    frame: pd.DataFrame, labels: tuple[str, str], panel: Callable[[Axes, pd.DataFrame], None]
) -> AbstractContextManager[Figure]:
    """Return `panels` where `panel` drew the rows of each model (down) on each dataset (across)."""

    def of_model(axes: Axes, model: str, dataset: str) -> None:
        panel(axes, frame[(frame["model"] == model) & (frame["dataset"] == dataset)])
        charts.panel_title(axes, model, dataset)

    models, datasets = charts.facets(frame)
    return panels(models, datasets, 0.75 + 1.05 * len(models), labels, of_model)


def paired_bars(
    axes: Axes,
    frame: pd.DataFrame,
    by: str,
    value: str,
    looks: Mapping[str, charts.Look],
    models: list[str],
) -> None:
    """Draw the two values of column `by` that have `looks` side by side for each model."""
    for number, (name, look) in enumerate(looks.items()):
        one = frame[frame[by] == name.lower()].set_index("model").reindex(models)
        centres = np.arange(len(models)) + 0.4 * (number - 0.5)
        mean, spread = charts.interval(one, value, "low", "high")
        axes.bar(centres, mean, 0.38, color=look["color"], yerr=spread, error_kw=WHISKER)
        for centre in centres[np.isnan(mean)]:
            axes.text(centre, 0.01, "n/a", ha="center", va="bottom", fontsize=6)
    # In two lines below their bars.
    names = ["\n".join(model_name(one).rsplit("-", 1)) for one in models]
    axes.set_xticks(range(len(models)), names)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)


def band(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str,
    look: charts.Look,
    factor: float = 1,
) -> None:
    """Draw the means `y` over `x` as a line and low to high as a band, times `factor`."""
    colour = look["color"]
    axes.plot(
        rows[x], rows[y] * factor, color=colour, ls=look["linestyle"], marker=look["marker"],
        markeredgecolor="white", markeredgewidth=0.3,
    )  # fmt: skip
    axes.fill_between(
        rows[x], rows["low"] * factor, rows["high"] * factor, color=colour, alpha=0.2, lw=0
    )
