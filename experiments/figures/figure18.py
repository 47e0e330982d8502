"""Figure 18: memory of the expert map store against its capacity, for the real models' sizes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments.figures import style, traces
from experiments.figures.style import Drawn
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import ModelShape

PANELS = {"maps_mb": "Expert maps", "total_mb": "Maps and embeddings"}
CLAIMED_MB = 200
"""What the paper says 32K maps stay below (section 6.7)."""


def analyse(cfg: DictConfig, recorded: traces.Traces, folder: Path) -> None:
    """Write memory.csv: model, capacity, maps_mb (fp32 maps) and total_mb, in 10^6 bytes."""
    names = list(cfg.experiment.models)
    tables = [memory(name, list(cfg.experiment.capacities)) for name in names]
    traces.write_analysis(cfg, folder, "memory", pd.concat(tables, ignore_index=True))


def memory(name: str, capacities: list[int]) -> pd.DataFrame:
    """Return what stores of these capacities take, as `ExpertMapStore` allocates them."""
    facts = traces.model_facts(name)
    shape = ModelShape(facts.layers, facts.experts, facts.top_k, facts.hidden_size)
    rows = []
    for capacity in capacities:
        store = ExpertMapStore(shape, capacity, facts.prefetch_distance)
        taken = store.memory_bytes()
        rows.append((name, capacity, taken["maps"] / 1e6, taken["store"] / 1e6))
    return pd.DataFrame(rows, columns=["model", "capacity", "maps_mb", "total_mb"])


def draw(folder: Path, place: Path, mixed_modes: bool = False) -> Drawn:
    """Draw a line a model on logarithmic axes: maps alone, and with embeddings."""
    found = traces.read_analysis(folder)
    frame = found.table
    looks = traces.model_looks(style.ordered(frame["model"], style.MODELS))
    with style.canvas(1, len(PANELS), style.COLUMN_INCHES, 2.0) as figure:
        largest = frame["total_mb"].max()
        ticks = sorted(set(frame["capacity"]))
        low = frame["maps_mb"].min() / 1.4
        for axes, (kind, name) in zip(figure.axes, PANELS.items(), strict=True):
            for model, look in looks.items():
                one = frame[frame["model"] == model]
                axes.plot(one["capacity"], one[kind], color=look["color"], marker=look["marker"])
            axes.axhline(CLAIMED_MB, color="#333333", lw=0.8, ls="--")
            axes.set_title(name, pad=3)
            axes.set(xscale="log", yscale="log", ylim=(low, largest * 1.6))
            axes.set_xticks(ticks, [f"{tick / 1000:g}K" for tick in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="y", labelleft=kind == "maps_mb")
        figure.axes[0].text(ticks[0], CLAIMED_MB * 1.1, f"{CLAIMED_MB} MB", fontsize=6, va="bottom")
        figure.axes[0].set_ylabel("Store memory (MB)")
        figure.supxlabel("Store capacity (iterations)", fontsize=style.POINTS)
        traces.apart(figure)
        traces.model_legend(figure, looks)
        return found.save(
            figure,
            place,
            "Host memory of an expert map store, 1 MB = 10^6 bytes, for the real models' layers, "
            "experts and hidden sizes, fp32. Left, the maps alone, as the paper counts; right, "
            "with the embeddings and the norms kept for the search. Dashed: the paper's 200 MB.",
        )
