"""Write the report of a results folder: ``python -m experiments.judge.report results=<folder>``.

`REPORT.md` links the figures; `report.html` is one file with everything in it. Both say the same,
and the same records give the same report but for the time of writing.
"""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from experiments.errors import command, refusing
from experiments.judge import readings
from experiments.judge.claims import RULES, VERDICTS, Verdict, arguments, judge
from experiments.judge.frame import IDS, PREDICTION, ResultsFolder, by_system, commit
from experiments.run.records import read_table
from experiments.style import dataset_name, model_name, system_name
from finemoe.files import atomic_write

MARKDOWN, PAGE = "REPORT.md", "report.html"
NAMES = {"table1": "Table 1", "readings": "Readings", "unknowns": "Unknowns"}
HEADLINES = ("Abstract", "Talk")
DATA_ROWS = 60  # a figure's data is shown up to so many rows; the CSV beside it has them all
DIGEST = 12
PIXELS_PER_CSS_PIXEL = 2.4  # of a figure at 300 dpi, so that its type is as large as a table's
BROAD = 600  # a figure of more CSS pixels scrolls on a phone rather than shrinks


def write(
    results: ResultsFolder, mixed_modes: bool = False, claims: Path | None = None
) -> list[Verdict]:
    """Judge, write REPORT.md and report.html, return the verdicts. Raises UserError, OSError."""
    verdicts = judge(results, mixed_modes, claims)
    headlines = [one for one in verdicts if one.section in HEADLINES]
    others = [one for one in verdicts if one.section not in HEADLINES]
    judged = results.root / "analysis" / "readings" / readings.TABLE
    ids = dict.fromkeys([*IDS, *(one.experiment for one in others)])
    sections = [_section(results, name, others) for name in ids]
    in_order = headlines + [one for section in sections for one in section["verdicts"]]
    content = {
        "headlines": headlines,
        "sections": sections,
        "readings": readings.summary(read_table(judged)) if judged.exists() else {},
        "claims": {name: [one for one in in_order if one.verdict == name] for name in VERDICTS},
        "total": len(verdicts),
        "modes": _listed(one.mode for one in verdicts),
        "weights": _listed(one.weights for one in verdicts),
        "rules": RULES,
        "provenance": _provenance(results),
        "runs": results.runs if results.runs.empty else _run_table(results.runs),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name in (MARKDOWN, PAGE):
        with atomic_write(results.root / name) as partial:
            partial.write_text(_render(name, content) + "\n")
    return verdicts


def _render(name: str, content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name == PAGE,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Markdown is kept from taking what a record says for a tag.
        finalize=None if name == PAGE else lambda one: str(one).replace("<", "&lt;"),
    )
    environment.filters["sentences"] = _sentences
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    return environment.get_template(f"report_template{Path(name).suffix}").render(content)


def _sentences(text: str) -> list[str]:
    """Return the sentences, each with its numbers tied to their units."""
    tied = re.sub(r"(?<=\d) (?=(%|GB|MB|ms|s)\b|%)", "\N{NO-BREAK SPACE}", text)
    return re.split(r"(?<=\.) (?=[A-Z0-9])", tied)


def _section(results: ResultsFolder, name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    picture, caption, csv = (results.figures / f"{name}.{one}" for one in ("png", "txt", "csv"))
    data = read_table(csv) if csv.exists() else pd.DataFrame()
    about = results.index(name) or results.analysis_record(name)
    return {
        "id": name,
        "name": NAMES.get(name) or f"Figure {name}",
        "title": about.get("title", ""),
        "caption": caption.read_text(errors="replace").strip() if caption.exists() else "",
        "picture": _picture(picture) if picture.exists() else None,
        "made": picture.exists() or csv.exists(),
        "data": data.head(DATA_ROWS).map(_shown),
        "left_out": max(0, len(data) - DATA_ROWS),
        "systems": system_table(pd.DataFrame() if "views" in about else results.runs_of(name)),
        "verdicts": [one for one in verdicts if one.experiment == name],
    }


def _picture(path: Path) -> dict[str, Any]:
    """Return a figure as a PNG of at most 256 colours, and its size in CSS pixels."""
    with refusing(f"{path}: not an image", OSError, remedy="draw it again"):
        whole = Image.open(path).convert("RGB")
    packed = io.BytesIO()
    whole.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(packed, "PNG", optimize=True)
    width, height = (max(1, round(side / PIXELS_PER_CSS_PIXEL)) for side in whole.size)
    encoded = base64.b64encode(packed.getvalue()).decode()
    return {"base64": encoded, "width": width, "height": height, "broad": width > BROAD}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1", str(value))


def system_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row of text per system; empty without runs. See SYSTEMS_NOTE for the columns."""
    if runs.empty:
        return pd.DataFrame()
    groups = by_system(runs)
    sums = groups.sum(numeric_only=True)
    asked = sums[["hits", "late", "misses", "host"]].sum(axis=1)
    ahead, wasted, on_demand = (
        sums.get(f"bytes_{name}", 0 * asked) / 1e9 for name in ("prefetched", "wasted", "on_demand")
    )
    # A run below its bound has none.
    bounded = groups["bound_times"].agg(lambda times: times.ge(1).all()).astype(bool)
    bounds = sums[["bound_link_s", "bound_compute_s"]].where(bounded, axis=0)
    predicts = sums[[f"phase_{one}_s" for one in PREDICTION]].sum(axis=1)
    columns = {
        "hit, %": sums["hits"] / asked,
        "late, %": sums["late"] / asked,
        "miss, %": sums["misses"] / asked,
        "ahead, GB": ahead / sums["requests"],
        "in vain, %": wasted / ahead,
        "on demand, GB": on_demand / sums["requests"],
        "waits for experts, %": sums["phase_on_demand_wait_s"] / sums["busy_s"],
        "waits for prefetches, %": sums["phase_prefetch_wait_s"] / sums["busy_s"],
        "predicts, %": predicts / sums["busy_s"],
        "least loads, %": bounds["bound_link_s"] / sums["busy_s"],
        "compute, %": bounds["bound_compute_s"] / sums["busy_s"],
    }
    texts = {name: [_cell(name, one) for one in values] for name, values in columns.items()}
    return pd.DataFrame({"system": sums.index, **texts})


def _cell(column: str, value: float) -> str:
    """Return a share, or a number of three digits or more, without an exponent if it is large."""
    if "%" in column:
        return f"{100 * value:.1f}" if np.isfinite(value) else ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _provenance(results: ResultsFolder) -> dict[str, str]:
    runs = list(results.runs.get("record", ()))
    analyses = [record for name in IDS if (record := results.analysis_record(name))]
    origins = [*runs, *(one["provenance"] for one in analyses)]
    subjects = [subject for one in analyses for subject in one["subjects"]]
    packages = [f"{name} {number}" for one in origins for name, number in one["versions"].items()]
    traces = [f"a trace of {one['model']} with weights {one['weights']}" for one in subjects]
    dates = sorted(one["date"] for one in origins)
    facts = {
        "records": f"{len(runs)} runs, {len(analyses)} analyses",
        "commit": _listed(map(commit, origins)),
        "recorded": f"{dates[0]} to {dates[-1]}" if dates else "",
        "mode": _listed(one["mode"] for one in [*runs, *analyses]),
        "testbed": _listed(run["testbed"] for run in runs),
        "weights": _listed(one["weights"] for one in [*runs, *subjects]),
        "routing": _listed([*(run["routing"] for run in runs), *traces]),
        "data": _listed(f"{run['dataset']}: {run['dataset_source']} "
                        f"(sha256 {run['dataset_sha256'][:DIGEST]})" for run in runs),
        "seeds": _listed(str(run["seed"]) for run in runs),
        "machine": _listed(f"{one['cpu']}, {one['cores']} cores, {one['memory_gb']} GB, "
                           f"{', '.join(one['gpus']) or 'no accelerator'} ({one['system']})"
                           for one in (origin["machine"] for origin in origins)),
        "versions": _listed([f"Python {one['python']}" for one in origins] + packages),
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value}


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted({one for one in values if one}))


def _run_table(runs: pd.DataFrame) -> pd.DataFrame:
    names = ["digest", "system", "model", "dataset", "GB", "testbed", "mode", "seed", "commit"]
    return runs.assign(
        digest=runs["digest"].str[:DIGEST],
        system=runs["system"].map(system_name),
        model=runs["model"].map(model_name),
        dataset=runs["dataset"].map(dataset_name),
        GB=runs["memory_budget_gb"].map("{:.3g}".format),
        commit=[str(one.get("git_commit") or "unknown")[:DIGEST] for one in runs["record"]],
    )[names]


@command()
def main() -> None:
    """Write the report; exit 2 for bad input."""
    results, mixed_modes, claims = arguments(__doc__)
    write(results, mixed_modes, claims)
    print(f"report: {results.root / MARKDOWN}, {results.root / PAGE}")


if __name__ == "__main__":
    main()
