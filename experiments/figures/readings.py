"""Claims under every reading of the paper, and what moves its headline numbers most."""

import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from experiments import style
from experiments.figures import charts
from experiments.judge.claims import FAILS, HOLDS, UNTESTABLE, WEAKER
from experiments.judge.readings import DEFAULT, TABLE
from experiments.run.records import read_table

MARKS: dict[str, style.Look] = {
    HOLDS: {"marker": "o", "color": "#0072B2", "linestyle": ""},
    WEAKER: {"marker": "o", "color": "#0072B2", "linestyle": "", "markerfacecolor": "white"},
    FAILS: {"marker": "x", "color": "#D55E00", "linestyle": ""},
    UNTESTABLE: {"marker": "_", "color": "#666666", "linestyle": ""},
}


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a mark for each claim (down) under each reading (across); faint ones are the default's.

    Claims that no reading touches are left out.
    """
    table = read_table(folder / TABLE).astype({"experiment": str})
    touched = table[table.groupby("claim")["touched"].transform("any")]
    texts = touched.drop_duplicates("claim").set_index("claim")["text"]
    readings = touched["reading"].drop_duplicates().tolist()
    height = 1.6 + 0.2 * len(texts)
    with charts.panels([""], [""], style.PAGE_INCHES, height) as (figure, [(axes, _, _)]):
        for name, look in MARKS.items():
            _mark(axes, touched[touched["verdict"] == name], look, list(texts.index), readings)
        lines = [textwrap.fill(text, 54, break_on_hyphens=False) for text in texts]
        axes.set_yticks(range(len(texts)), lines, fontsize=style.POINTS - 1.5, linespacing=0.9)
        axes.set_xticks(range(len(readings)), readings, rotation=50, ha="left")
        axes.xaxis.tick_top()
        axes.set(xlim=(-0.6, len(readings) - 0.4), ylim=(len(texts) - 0.4, -0.6))
        axes.axvspan(-0.5, 0.5, color="#eeeeee", lw=0, zorder=0)
        present = {name: look for name, look in MARKS.items() if name in set(touched["verdict"])}
        charts.legend(figure, present)
        caption = (
            "Verdicts under every reading of what the paper leaves open; one choice changes at a "
            "time, but for the second and the third column. Faint: the reading concerns none of "
            f"the claim's runs. {_runs(table)}"
        )
        charts.write(figure, table, output, folder.name, caption)


def _runs(table: pd.DataFrame) -> str:
    figures, modes = (", ".join(sorted(set(table[key]))) for key in ("experiment", "mode"))
    return f"Runs: of figures {figures}, narrowed as the experiment's file says. Mode: {modes}."


def _mark(
    axes: Axes, rows: pd.DataFrame, look: style.Look, claims: list[str], readings: list[str]
) -> None:
    own = rows["touched"] | (rows["reading"] == DEFAULT)
    for part, alpha in ((rows[own], 1.0), (rows[~own], 0.25)):
        x, y = part["reading"].map(readings.index), part["claim"].map(claims.index)
        axes.plot(x, y, **look, ms=5, mew=1.2, alpha=alpha, zorder=3)


def draw_unknowns(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Draw a tornado a headline: from the default's value to that under each other assumption."""
    table = read_table(folder / TABLE).astype({"experiment": str})
    table = table[table["section"].isin(["Abstract", "Talk"])]
    headlines = table.drop_duplicates("claim")
    count = table["reading"].nunique() - 1
    size = style.COLUMN_INCHES, 0.5 + len(headlines) * (0.45 + 0.125 * count)
    with charts.panels(list(headlines["claim"]), [""], *size) as (figure, panels):
        for axes, claim, _ in panels:
            rows = table[table["claim"] == claim].set_index("reading")
            usual = rows.loc[DEFAULT]
            moves = (rows["ours"] - usual["ours"]).drop(DEFAULT)
            moves = moves[moves.abs().sort_values().index]
            colours = ["#0072B2" if move > 0 else "#D55E00" for move in moves]
            axes.barh(range(len(moves)), moves, left=usual["ours"], color=colours, height=0.7)
            axes.axvline(usual["ours"], color="#333333", lw=0.8)
            axes.axvline(usual["paper"], color="#333333", lw=0.8, ls=charts.REFERENCE_DASHES)
            axes.set_yticks(range(len(moves)), list(moves.index), fontsize=style.POINTS - 1.5)
            title = usual["text"].replace(" %", "\N{NO-BREAK SPACE}%")
            axes.set_title(textwrap.fill(title, 36), fontsize=style.POINTS - 0.5)
            axes.set_xlabel(f"here ({usual['unit']})")
            axes.grid(axis="y", visible=False)
        caption = (
            "What moves the headline numbers: from their value by default (solid line) to that "
            "under one other assumption at a time. Dashed: the paper's value. "
            f"{_runs(table)}"
        )
        charts.write(figure, table, output, folder.name, caption)
