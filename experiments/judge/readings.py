"""Every claim about runs under every reading of what the paper leaves open (docs/fidelity.md)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.judge.claims import HOLDS, UNTESTABLE, WEAKER, judge_one, load_claims
from finemoe.files import write_csv

DEFAULT = "default"  # the reading that all others are compared with
TABLE, LATENCIES = "verdicts.csv", "latencies.csv"
COLUMNS = (
    *("claim", "experiment", "section", "text", "reading", "touched"),
    *("verdict", "ours", "low", "high", "paper", "unit", "mode", "why"),
)
METRICS = ("ttft_s", "tpot_s", "hit_rate")
View = Mapping[str, Sequence[str]]  # digests of an experiment's runs, by its id


def analyse(runs: pd.DataFrame, views: Mapping[str, View], folder: Path) -> None:
    """Leave `verdicts` and, of the runs of figure 10, `latencies` as CSV files in the folder."""
    write_csv(folder / TABLE, verdicts(runs, views))
    write_csv(folder / LATENCIES, latencies(runs, views))


def latencies(runs: pd.DataFrame, views: Mapping[str, View]) -> pd.DataFrame:
    """Return TTFT, TPOT (s) and hit rate of each model, dataset and system under each reading."""
    by_digest = runs.set_index("digest")[["model", "dataset", "system", *METRICS]]
    parts = {name: by_digest.loc[[*view.get("10", ())]] for name, view in views.items()}
    return pd.concat(parts, names=["reading", "digest"]).reset_index().drop(columns="digest")


def verdicts(runs: pd.DataFrame, views: Mapping[str, View]) -> pd.DataFrame:
    """Judge the claims that the default reading decides, under every reading; columns: COLUMNS."""
    judged: list[dict[str, Any]] = []
    by_digest = runs.set_axis(runs["digest"].tolist())

    def rows(view: View, experiment: str) -> pd.DataFrame:
        return by_digest.loc[[*view.get(experiment, ())]]

    for claim in load_claims():
        of_each = {name: judge_one(claim, partial(rows, one)) for name, one in views.items()}
        usual = of_each[DEFAULT]
        if usual.verdict == UNTESTABLE:
            continue
        for name, one in of_each.items():
            if claim.experiment in views[name]:
                touched = one.digests != usual.digests
                judged.append({**vars(one), "claim": one.id, "reading": name, "touched": touched})
    return pd.DataFrame(judged, columns=[*COLUMNS])


def summary(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the claims that hold, fully or weaker, under every reading, under some, and none."""
    held = table["verdict"].isin([HOLDS, WEAKER]).groupby(table["claim"], sort=False).mean()
    kinds = {"every": held == 1, "some": held.between(0, 1, "neither"), "none": held == 0}
    return {kind: held.index[these].tolist() for kind, these in kinds.items()}
