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

SYSTEMS = {
    "deepspeed": "DeepSpeed",
    "mixtral_offload": "Mixtral-Offloading",
    "promoe": "ProMoE",
    "moe_infinity": "MoE-Infinity",
    "finemoe": "FineMoE",
    "on_demand": "On-demand",
    "belady": "Belady",
    "oracle": "Oracle",
    "resident": "No offload",
    "deepspeed_zero": "DeepSpeed ZeRO-3",
}
"""Display names, in the order of drawing: as in the paper, then bounds and references."""
PAPER_SYSTEMS = ("deepspeed", "mixtral_offload", "promoe", "moe_infinity", "finemoe")
# Okabe and Ito's colours, told apart with any colour vision; grey and black for what is no system.
COLOURS = {
    "deepspeed": "#CC79A7",
    "mixtral_offload": "#E69F00",
    "promoe": "#56B4E9",
    "moe_infinity": "#009E73",
    "finemoe": "#D55E00",
    "on_demand": "#999999",
    "belady": "#F0E442",
    "oracle": "#0072B2",
    "resident": "#222222",
    "deepspeed_zero": "#7A4A65",
}
MARKERS = {
    "deepspeed": "v",
    "mixtral_offload": "s",
    "promoe": "D",
    "moe_infinity": "^",
    "finemoe": "o",
    "on_demand": "X",
    "belady": "P",
    "oracle": "*",
    "resident": "h",
    "deepspeed_zero": "<",
}
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
def canvas(rows: int, columns: int, width: float, height: float) -> Iterator[Figure]:
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
        "lines.markersize": 3.5,
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
