"""Table 1: what the three models are, from their published shapes."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.transforms import Bbox
from omegaconf import DictConfig

from experiments import style
from experiments.figures import analyses, charts
from experiments.run.config import full_size

SHOWS = (
    "K: experts a token activates, J: experts a layer, L: layers with experts, d: prefetch "
    "distance; one expert and the inactive parameters in bf16, 1 GB = 10^9 bytes; norms and biases "
    "are not counted."
)


def analyse(cfg: DictConfig, traces: analyses.Traces, folder: Path) -> None:
    """Write models.csv: one row a model, parameters in 10^9, sizes in 10^9 bytes (expert: 10^6)."""
    rows = [characteristics(name) for name in cfg.experiment.models]
    analyses.write_analysis(cfg, folder, "models", pd.DataFrame(rows))


def characteristics(name: str) -> dict[str, Any]:
    """Return the row of one model; norms and biases are not counted."""
    facts = analyses.model_facts(name)
    model = full_size(facts)
    width = model.bytes_per_parameter
    total, active = (
        model.dense_bytes // width + model.layers * each * model.expert_parameters
        for each in (model.experts, model.top_k)
    )
    return {
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


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw the table as a picture, one row a model; the CSV has the unrounded numbers."""
    record, frame = analyses.read_analysis(folder)
    rows = [_rounded(row) for row in frame.to_dict("records")]
    size = style.PAGE_INCHES, 0.3 + 0.22 * len(rows)
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
        analyses.save(figure, output, record, frame, SHOWS)


def _rounded(row: Any) -> dict[str, str]:
    """Return the cells of one model under their heads."""
    return {
        "Model": style.model_name(row["model"]),
        "Active / total": f"{row['active_b']:.1f} / {row['total_b']:.1f} B",
        "K / J": f"{row['top_k']} / {row['experts']}",
        "L": str(row["layers"]),
        "d": str(row["distance"]),
        "One expert": f"{row['expert_mb']:.{0 if row['expert_mb'] > 100 else 1}f} MB",
        "Inactive": f"{row['inactive_share']:.0%} = {row['inactive_gb']:.0f} GB",
    }
