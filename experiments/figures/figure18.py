"""Figure 18: memory of the expert map store against its capacity, for the real models' sizes."""

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import ModelShape

PANELS = {"maps_mb": "Expert maps", "total_mb": "Maps and embeddings"}
CLAIMED_MB = 200
"""What the paper says 32K maps stay below (section 6.7)."""
SHOWS = (
    "Host memory of an expert map store, 1 MB = 10^6 bytes, for the real models' layers, experts "
    "and hidden sizes, fp32. Left, the maps alone, as the paper counts; right, with the embeddings "
    "and the norms kept for the search. Dashed: the paper's 200 MB."
)


def analyse(cfg: DictConfig, traces: analyses.Traces, folder: Path) -> None:
    """Write memory.csv: model, capacity, maps_mb (fp32 maps) and total_mb, in 10^6 bytes."""
    tables = [memory(name, cfg.experiment.capacities) for name in cfg.experiment.models]
    analyses.write_analysis(cfg, folder, "memory", pd.concat(tables, ignore_index=True))


def memory(name: str, capacities: list[int]) -> pd.DataFrame:
    """Return what stores of these capacities take, as `ExpertMapStore` allocates them."""
    facts = analyses.model_facts(name)
    shape = ModelShape(facts.layers, facts.experts, facts.top_k, facts.hidden_size)
    rows = []
    for capacity in capacities:
        store = ExpertMapStore(shape, capacity, facts.prefetch_distance)
        taken = store.memory_bytes()
        rows.append((name, capacity, taken["maps"] / 1e6, taken["store"] / 1e6))
    return pd.DataFrame(rows, columns=["model", "capacity", "maps_mb", "total_mb"])


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a line a model on logarithmic axes: maps alone, and with embeddings."""
    record, frame = analyses.read_analysis(folder)
    looks = style.model_looks(style.ordered(frame["model"], style.MODELS))
    ticks = sorted(set(frame["capacity"]))
    ylim = frame["maps_mb"].min() / 1.4, frame["total_mb"].max() * 1.6
    with charts.panels([""], list(PANELS), style.COLUMN_INCHES, 2.0) as (figure, panels):
        for axes, _, kind in panels:
            for model, look in looks.items():
                part = frame[frame["model"] == model]
                axes.plot(part["capacity"], part[kind], **look)
            axes.axhline(CLAIMED_MB, color="#333333", lw=0.8, ls="--")
            axes.set_title(PANELS[kind])
            axes.set(xscale="log", yscale="log", ylim=ylim)
            axes.set_xticks(ticks, [f"{tick / 1000:g}K" for tick in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.label_outer()
        figure.axes[0].text(ticks[0], CLAIMED_MB * 1.1, f"{CLAIMED_MB} MB", fontsize=6, va="bottom")
        figure.axes[0].set_ylabel("Store memory (MB)")
        figure.supxlabel("Store capacity (iterations)", fontsize=style.POINTS)
        charts.apart(figure)
        charts.model_legend(figure, looks)
        analyses.save(figure, output, record, frame, SHOWS)
