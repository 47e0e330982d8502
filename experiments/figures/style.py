"""How every figure looks: names, order and colours of systems and models, sizes, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.errors import UserError
from finemoe.files import atomic_write

COLUMN_INCHES, PAGE_INCHES = 3.33, 7.0
"""Widths of a column and of a page of the paper's format."""
POINTS = 7.5
DPI = 300

# Okabe and Ito's colours, told apart with any colour vision; grey and black for what is no system.
_SYSTEMS = {
    "deepspeed": ("DeepSpeed", "#CC79A7", "v"),
    "mixtral_offload": ("Mixtral-Offloading", "#E69F00", "s"),
    "promoe": ("ProMoE", "#56B4E9", "D"),
    "moe_infinity": ("MoE-Infinity", "#009E73", "^"),
    "finemoe": ("FineMoE", "#D55E00", "o"),
    "on_demand": ("On-demand", "#999999", "X"),
    "belady": ("Belady", "#F0E442", "P"),
    "oracle": ("Oracle", "#0072B2", "*"),
    "resident": ("No offload", "#222222", "h"),
    "deepspeed_zero": ("DeepSpeed ZeRO-3", "#7A4A65", "<"),
}
"""Display names, colours and markers, in the order of drawing: as in the paper, then bounds."""
SYSTEMS, COLOURS, MARKERS = (
    {system: look[place] for system, look in _SYSTEMS.items()} for place in range(3)
)
PAPER_SYSTEMS = ("deepspeed", "mixtral_offload", "promoe", "moe_infinity", "finemoe")
MODELS = {"mixtral": "Mixtral-8x7B", "qwen": "Qwen1.5-MoE", "phi": "Phi-3.5-MoE"}
MODEL_COLOURS = {"mixtral": "#0072B2", "qwen": "#E69F00", "phi": "#009E73"}
DATASETS = {"docs": "docs", "code": "code", "lmsys": "LMSYS", "sharegpt": "ShareGPT"}
METRICS = {
    "ttft_s": ("TTFT (s)", 1.0),
    "tpot_s": ("TPOT (ms)", 1e3),
    "e2el_s": ("End-to-end latency (s)", 1.0),
    "hit_rate": ("Expert hit rate (%)", 100.0),
}
"""Axis label of a frame's column, and what its values are multiplied by for that unit."""
HATCHES = ("", "////", "....", "xxxx")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Drawn:
    """The files that one figure left, and its caption."""

    png: Path
    pdf: Path
    csv: Path
    caption: str


def system_name(system: str) -> str:
    """Return how a system is called in figures."""
    return SYSTEMS.get(system, system)


def model_name(model: str) -> str:
    """Return how a model is called in figures."""
    return MODELS.get(model, model)


def dataset_name(dataset: str) -> str:
    """Return how a dataset is called in figures."""
    return DATASETS.get(dataset, dataset)


def ordered(values: pd.Series | list[str], known: dict[str, str]) -> list[str]:
    """Return the distinct values: those `known` in its order, then others by name."""
    found = set(values)
    return [one for one in known if one in found] + sorted(found - set(known))


@contextmanager
def canvas(
    rows: int, columns: int, width: float, height: float, marker_points: float = 3.5
) -> Iterator[Figure]:
    """Yield a figure of rows x columns panels, `width` x `height` inches; closed afterwards."""
    settings: Any = {
        "font.size": POINTS,
        "axes.labelsize": POINTS,
        "axes.titlesize": POINTS,
        "xtick.labelsize": POINTS - 0.5,
        "ytick.labelsize": POINTS - 0.5,
        "legend.fontsize": POINTS,
        "legend.title_fontsize": POINTS,
        "axes.linewidth": 0.6,
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.2,
        "lines.markersize": marker_points,
        "hatch.linewidth": 0.5,
        "pdf.fonttype": 42,
        "figure.constrained_layout.h_pad": 0.03,
        "figure.constrained_layout.w_pad": 0.03,
    }
    matplotlib.use("Agg")
    with sns.axes_style("whitegrid"), sns.plotting_context("paper"), plt.rc_context(settings):
        figure, _ = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False
        )
        try:
            for axes in figure.axes:
                axes.tick_params(length=2, pad=2)
                sns.despine(ax=axes)
            yield figure
        finally:
            plt.close(figure)


def save(figure: Figure, data: pd.DataFrame, place: Path, name: str, caption: str) -> Drawn:
    """Write `<place>/<name>` as png, pdf, csv (the data drawn) and txt (the caption).

    The same figure gives the same bytes on the same machine. Raises UserError if `place` cannot be
    written to.
    """
    paths = {kind: place / f"{name}.{kind}" for kind in ("png", "pdf", "csv", "txt")}
    try:
        for kind, path in paths.items():
            with atomic_write(path) as partial:
                if kind == "csv":
                    data.to_csv(partial, index=False)
                elif kind == "txt":
                    partial.write_text(caption + "\n")
                else:
                    dated = {"CreationDate": None} if kind == "pdf" else None
                    figure.savefig(partial, format=kind, dpi=DPI, metadata=dated)
    except OSError as error:
        cause = f"cannot write figures to {place}: {error.strerror}"
        raise UserError(f"{cause}; choose another folder") from error
    return Drawn(paths["png"], paths["pdf"], paths["csv"], caption)
