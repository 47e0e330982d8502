"""Write the report of a results folder: ``python -m experiments.judge.report results=<folder>``.

`REPORT.md` links the figures; `report.html` is one file with everything in it, readable on a phone
and printed. Both say the same: each claim with its verdict, each figure with its caption and data,
and where all of it came from. The same records give the same report but for the time of writing.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image, UnidentifiedImageError

from experiments.errors import UserError, command
from experiments.figures.style import dataset_name, model_name, system_name
from experiments.judge.claims import RULES, VERDICTS, Verdict, arguments, judge, write_text
from experiments.judge.frame import ResultsFolder
from experiments.judge.system_table import NOTE, system_table
from experiments.run.records import read_table

TEMPLATES = Path(__file__).parent
MARKDOWN, PAGE = "REPORT.md", "report.html"
IDS = (
    "table1", "1b", "3a", "3b", "3c", "4", "8", "9", "10", "11", "12", "13", "14a", "14b", "15",
    "16a", "16b", "17", "18",
)  # fmt: skip
"""Experiments in the paper's order."""
HEADLINES = ("Abstract", "Talk")
DATA_ROWS = 60
"""A figure's data is shown up to so many rows; the CSV beside it has them all."""
DIGEST = 12
PIXELS_PER_CSS_PIXEL = 2.4
"""Pixels of a figure at 300 dpi to a CSS pixel: its 8-point type is then as large as a table's."""
SHORT = 60
"""A first sentence of fewer characters is shown with the second; the others are folded."""
BROAD = 600
"""A figure of more CSS pixels scrolls on a phone rather than shrinks."""
TERMS = {
    "measured": "the model ran on CUDA devices; experts came over PCIe from page-locked memory.",
    "emulated": "the model ran on the CPU; each expert was copied, paced to a PCIe link.",
    "simulated": "a routing trace was replayed in virtual time, with the live policy, cache and "
    "queue; compute and links cost what a roofline over the full-size model says, or, on a "
    "calibrated testbed, what was measured.",
    "analysis of routing traces": "counted from the recorded choices of the gates; no time enters.",
    "computed from the models' published shapes": "arithmetic on layers, experts and hidden "
    "sizes; nothing ran.",
    "scale weights": "small trained members of the paper's model families with the paper models' "
    "routing shapes; bytes moved are those of the full-size models.",
    "TTFT, TPOT": "the time to the first token, and the time per output token after it.",
    "cell": "one combination of what a claim ranges over, mostly a model and a dataset.",
    "bound": "the least possible time: the longer of compute alone and of the bytes that no "
    "system can avoid to move, over their links.",
}
"""What the reports' words mean. Both print this."""


@dataclass(frozen=True)
class Picture:
    """A figure to be shown in a page, `width` x `height` CSS pixels."""

    base64: str
    """A PNG of at most 256 colours."""
    width: int
    height: int

    @property
    def broad(self) -> bool:
        return self.width > BROAD


@dataclass(frozen=True)
class Section:
    """One figure or table of the paper."""

    id: str
    name: str
    title: str
    caption: str
    picture: Picture | None
    """None if it was not drawn."""
    data: tuple[tuple[str, ...], ...]
    """Column names, then rows."""
    left_out: int
    """How many rows of data are not shown."""
    systems: tuple[tuple[str, ...], ...]
    """What the systems did: column names, then rows. Nothing where no system ran."""
    verdicts: tuple[Verdict, ...]

    @property
    def made(self) -> bool:
        return bool(self.picture or self.data)


def write(
    results: ResultsFolder, mixed_modes: bool = False, claims: Path | None = None
) -> list[Verdict]:
    """Judge the claims, then write REPORT.md and report.html into the folder; return the verdicts.

    Raises UserError if the folder is unreadable or cannot be written to, or if a figure in it is no
    image.
    """
    verdicts = judge(results, mixed_modes, claims)
    runs = dict(results.runs.get("record", {}))
    headlines = [one for one in verdicts if one.section in HEADLINES]
    sections = [_section(results, name, verdicts) for name in IDS]
    in_order = headlines + [one for section in sections for one in section.verdicts]
    content = {
        "headlines": headlines,
        "sections": sections,
        "claims": {name: [one for one in in_order if one.verdict == name] for name in VERDICTS},
        "total": len(verdicts),
        "modes": _listed(one.mode for one in verdicts if one.mode),
        "weights": _listed(one.weights for one in verdicts if one.weights),
        "rules": RULES,
        "terms": TERMS,
        "systems_note": NOTE,
        "short": SHORT,
        "provenance": _provenance(results, list(runs.values())),
        "runs": [_run_row(*run) for run in runs.items()],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name, escape in ((MARKDOWN, False), (PAGE, True)):
        write_text(results.root / name, _render(name, content, escape))
    return verdicts


def _render(name: str, content: Mapping[str, Any], escape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=None if escape else _without_tags,
    )
    environment.filters |= {"slug": _slug, "cell": _markdown_cell, "sentences": _sentences}
    suffix = Path(name).suffix
    return environment.get_template(f"report_template{suffix}").render(content) + "\n"


def _slug(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _without_tags(value: Any) -> Any:
    """Keep Markdown from taking what a record says for a tag."""
    return value.replace("<", "&lt;") if isinstance(value, str) else value


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sentences(text: str) -> list[str]:
    """Return the sentences, each with its numbers tied to their units."""
    tied = re.sub(r"(?<=\d) (?=(%|GB|MB|ms|s)\b|%)", "\N{NO-BREAK SPACE}", text)
    return re.split(r"(?<=\.) (?=[A-Z0-9])", tied)


# Figures and tables -------------------------------------------------------------------------------


def _section(results: ResultsFolder, name: str, verdicts: Sequence[Verdict]) -> Section:
    figures = results.root / "figures"
    picture, caption = figures / f"{name}.png", figures / f"{name}.txt"
    rows, left_out = _data(figures / f"{name}.csv")
    mine = [v for v in verdicts if v.experiment == name and v.section not in HEADLINES]
    return Section(
        name,
        f"Table {name.removeprefix('table')}" if name.startswith("table") else f"Figure {name}",
        _title(results, name),
        caption.read_text(errors="replace").strip() if caption.exists() else "",
        _picture(picture) if picture.exists() else None,
        rows,
        left_out,
        system_table(results.runs_of(name)),
        tuple(mine),
    )


def _picture(path: Path) -> Picture:
    try:
        with Image.open(path) as drawn:
            whole = drawn.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not an image; delete it and draw the figure again") from error
    packed = io.BytesIO()
    whole.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(packed, "PNG", optimize=True)
    width, height = (max(1, round(side / PIXELS_PER_CSS_PIXEL)) for side in whole.size)
    return Picture(base64.b64encode(packed.getvalue()).decode(), width, height)


def _title(results: ResultsFolder, name: str) -> str:
    held = results.index(name) or results.analysis_record(name)
    return str(held.get("title", ""))


def _data(path: Path) -> tuple[tuple[tuple[str, ...], ...], int]:
    if not path.exists():
        return (), 0
    frame = read_table(path)
    shown = frame.head(DATA_ROWS)
    rows = [tuple(_shown(value) for value in row) for row in shown.itertuples(index=False)]
    return (tuple(map(str, frame.columns)), *rows), len(frame) - len(shown)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    text = str(value)
    whole_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:DIGEST] if whole_digest else text


# Where it came from -------------------------------------------------------------------------------


def _provenance(results: ResultsFolder, runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the records say of commits, versions, machines, traces and seeds."""
    analyses = [record for name in IDS if (record := results.analysis_record(name))]
    origins = [*runs, *(one["provenance"] for one in analyses)]
    subjects = [subject for one in analyses for subject in one["subjects"]]
    packages = [f"{name} {number}" for one in origins for name, number in one["versions"].items()]
    found = {
        "records": f"{len(runs)} runs, {len(analyses)} analyses",
        "commit": _listed(map(_commit, origins)),
        "recorded": _span(one["date"] for one in origins),
        "mode": _listed(one["mode"] for one in [*runs, *analyses]),
        "testbed": _listed(run["testbed"] for run in runs),
        "weights": _listed(one["weights"] for one in [*runs, *subjects]),
        "routing": _listed([*(run["routing"] for run in runs), *map(_trace, subjects)]),
        "data": _listed(f"{run['dataset']}: {run['dataset_source']} "
                        f"(sha256 {run['dataset_sha256'][:DIGEST]})" for run in runs),
        "seeds": _listed(str(run["seed"]) for run in runs),
        "machine": _listed(map(_machine, origins)),
        "versions": _listed([f"Python {one['python']}" for one in origins] + packages),
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _span(dates: Iterable[str]) -> str:
    ordered = sorted(dates)
    return f"{ordered[0]} to {ordered[-1]}" if ordered else ""


def _commit(origin: Mapping[str, Any]) -> str:
    changed = " with uncommitted changes" if origin.get("git_dirty") else ""
    return f"{origin.get('git_commit') or 'unknown'}{changed}"


def _machine(origin: Mapping[str, Any]) -> str:
    one = origin["machine"]
    gpus = f", {', '.join(one['gpus'])}" if one["gpus"] else ", no accelerator"
    return f"{one['cpu']}, {one['cores']} cores, {one['memory_gb']} GB{gpus} ({one['system']})"


def _trace(subject: Mapping[str, Any]) -> str:
    return f"a trace of {subject['model']} with weights {subject['weights']}"


def _run_row(digest: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        digest[:DIGEST],
        system_name(record["system"]),
        model_name(record["model"]),
        dataset_name(record["dataset"]),
        f"{record['memory_budget_gb']:.3g}",
        record["testbed"],
        record["mode"],
        str(record["seed"]),
        str(record.get("git_commit") or "unknown")[:DIGEST],
    )


@command()
def main() -> None:
    """Write the report; exit 2 for bad input."""
    results, mixed_modes, claims = arguments(__doc__)
    write(results, mixed_modes, claims)
    print(f"report: {results.root / MARKDOWN}, {results.root / PAGE}")


if __name__ == "__main__":
    main()
