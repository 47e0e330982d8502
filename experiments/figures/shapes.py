"""What follows from the models' published shapes: table 1, and figure 18 (section 6.7)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.transforms import Bbox
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts
from experiments.run.config import full_size
from finemoe.expert_map import ExpertMapStore
from finemoe.offload.policy import ModelShape

STORES = {"maps_mb": "Expert maps", "total_mb": "Maps and embeddings"}
CLAIMED_MB = 200  # what the paper says 32K maps stay below (section 6.7)


@analyses.of_models
def models(name: str, experiment: DictConfig) -> Iterator[dict[str, Any]]:
    """Yield a model's parameters in 10^9, without norms and biases, and sizes in GB or MB."""
    facts = analyses.model_facts(name)
    model = full_size(facts)
    width = model.bytes_per_parameter
    total, active = (
        model.dense_bytes // width + model.layers * each * model.expert_parameters
        for each in (model.experts, model.top_k)
    )
    yield {
        "model": name,
        "hub_id": facts.hub_id,
        "active_b": active / 1e9,
        "total_b": total / 1e9,
        "top_k": model.top_k,
        "experts": model.experts,
        "layers": model.layers,
        "distance": facts.prefetch_distance,
        "expert_mb": model.expert_bytes / 1e6,
        "inactive_share": 1 - active / total,
        "inactive_gb": (total - active) * width / 1e9,
    }


def draw_models(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """K: experts a token activates, J: experts a layer, L: layers with experts, d: prefetch
    distance; one expert and the inactive parameters in bf16, 1 GB = 10^9 bytes; norms and biases
    are not counted.
    """
    record, frame = analyses.read_analysis(folder)
    rows = [_rounded(row) for row in frame.to_dict("records")]
    size = 0.3 + 0.22 * len(rows), style.PAGE_INCHES
    with charts.panels([""], [""], *size) as (figure, [(axes, _, _)]):
        axes.set_axis_off()
        heads = list(rows[0])
        look: Any = {"cellLoc": "center", "bbox": Bbox.unit(), "edges": "horizontal"}
        table = axes.table([list(row.values()) for row in rows], colLabels=heads, **look)
        table.auto_set_font_size(False)
        table.set_fontsize(style.POINTS)
        table.auto_set_column_width(range(len(heads)))
        for (row, _), cell in table.get_celld().items():
            cell.set_linewidth(0.6)
            cell.get_text().set_fontweight("bold" if row == 0 else "normal")
        analyses.save(figure, output, record, frame, draw_models.__doc__)


def _rounded(row: Any) -> dict[str, str]:
    return {
        "Model": style.model_name(row["model"]),
        "Active / total": f"{row['active_b']:.1f} / {row['total_b']:.1f} B",
        "K / J": f"{row['top_k']} / {row['experts']}",
        "L": str(row["layers"]),
        "d": str(row["distance"]),
        "One expert": f"{row['expert_mb']:.{0 if row['expert_mb'] > 100 else 1}f} MB",
        "Inactive": f"{row['inactive_share']:.0%} = {row['inactive_gb']:.0f} GB",
    }


@analyses.of_models
def memory(name: str, experiment: DictConfig) -> Iterator[dict[str, Any]]:
    """Yield what stores take as `ExpertMapStore` allocates them: maps and all, in 10^6 bytes."""
    facts = analyses.model_facts(name)
    shape = ModelShape(facts.layers, facts.experts, facts.top_k, facts.hidden_size)
    for capacity in experiment.capacities:
        taken = ExpertMapStore(shape, capacity, facts.prefetch_distance).memory_bytes()
        sizes = {"maps_mb": taken["maps"] / 1e6, "total_mb": taken["store"] / 1e6}
        yield {"model": name, "capacity": capacity, **sizes}


def draw_memory(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Host memory of an expert map store, 1 MB = 10^6 bytes, for the real models' layers, experts
    and hidden sizes, fp32. Left, the maps alone, as the paper counts; right, with the embeddings
    and the norms kept for the search. Dashed: the paper's 200 MB.
    """
    record, frame = analyses.read_analysis(folder)
    looks = style.model_looks(style.ordered(frame["model"], style.MODELS))
    ticks = sorted(set(frame["capacity"]))
    ylim = frame["maps_mb"].min() / 1.4, frame["total_mb"].max() * 1.6
    with charts.panels([""], list(STORES), 2.0) as (figure, panels):
        for axes, _, kind in panels:
            for model, look in looks.items():
                part = frame[frame["model"] == model]
                axes.plot(part["capacity"], part[kind], **look)
            axes.axhline(CLAIMED_MB, color="#333333", lw=0.8, ls="--")
            axes.set_title(STORES[kind])
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
        analyses.save(figure, output, record, frame, draw_memory.__doc__)
