"""Claims under every reading of the paper, and what moves its headline numbers most."""

import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import NullLocator

from experiments import style
from experiments.figures import charts
from experiments.judge.claims import FAILS, HOLDS, UNTESTABLE, WEAKER
from experiments.judge.readings import DEFAULT, LATENCIES, TABLE
from experiments.run.records import read_table

MARKS: dict[str, style.Look] = {
    HOLDS: {"marker": "o", "color": "#0072B2", "linestyle": ""},
    WEAKER: {"marker": "o", "color": "#0072B2", "linestyle": "", "markerfacecolor": "white"},
    FAILS: {"marker": "x", "color": "#D55E00", "linestyle": ""},
    UNTESTABLE: {"marker": "_", "color": "#666666", "linestyle": ""},
}

SMALL = 5.5  # points of what stands at a row or a column of many


def draw(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """Verdicts on the paper's claims, by id, under every reading of what the paper leaves open; one
    choice changes at a time, but for the second and the third column. Faint: the reading concerns
    none of the claim's runs. Empty: not run.
    """
    table = read_table(folder / TABLE).astype({"experiment": str})
    touched = table[table.groupby("claim")["touched"].transform("any")]
    claims, readings = (touched[name].drop_duplicates().tolist() for name in ("claim", "reading"))
    with charts.panels([""], [""], 1.7 + 0.105 * len(claims)) as (figure, [(axes, _, _)]):
        faint = ~touched["touched"] & (touched["reading"] != DEFAULT)
        for (name, look), alpha in product(MARKS.items(), (1.0, 0.25)):
            marked = touched[(touched["verdict"] == name) & (faint == (alpha < 1))]
            x, y = marked["reading"].map(readings.index), marked["claim"].map(claims.index)
            axes.plot(x, y, **look, ms=3, mew=0.8, alpha=alpha, zorder=3)
        axes.set_yticks(range(len(claims)), claims, fontsize=SMALL)
        axes.set_xticks(range(len(readings)), readings, fontsize=SMALL, rotation=60, ha="left")
        axes.tick_params(length=1.5, pad=1)
        axes.tick_params(axis="x", pad=-1)
        axes.xaxis.tick_top()
        axes.set(xlim=(-0.6, len(readings) - 0.4), ylim=(len(claims) - 0.4, -0.6))
        axes.axvspan(-0.5, 0.5, color="#eeeeee", lw=0, zorder=0)
        present = {name: look for name, look in MARKS.items() if name in set(touched["verdict"])}
        charts.legend(figure, present)
        charts.write(figure, table, output, folder.name, f"{draw.__doc__} {_runs(table)}")


def _runs(table: pd.DataFrame) -> str:
    figures, modes = (", ".join(sorted(set(table[key]))) for key in ("experiment", "mode"))
    return f"Runs: of figures {figures}, narrowed as the experiment's file says. Mode: {modes}."


def draw_unknowns(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """What moves the headline numbers: from their value by default (solid line) to that under one
    other assumption at a time. Dashed: the paper's value.
    """
    table = read_table(folder / TABLE).astype({"experiment": str})
    table = table[table["section"].isin(["Abstract", "Talk"])]
    headlines = table.drop_duplicates("claim")
    count = table["reading"].nunique() - 1
    height = 0.5 + len(headlines) * (0.45 + 0.125 * count)
    with charts.panels(list(headlines["claim"]), [""], height) as (figure, panels):
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
        charts.write(figure, table, output, folder.name, f"{draw_unknowns.__doc__} {_runs(table)}")


def draw_conditions(folder: Path, output: Path, mixed_modes: bool = False) -> None:
    """TTFT and TPOT of each system over the planner's, by condition: Mixtral, docs, 25 % of the
    experts' memory, six RTX 3090s and fixed batches unless the condition says otherwise. Mode:
    simulated.
    """
    table: Any = read_table(folder / LATENCIES).set_index(["reading", "system"])
    conditions = list(dict.fromkeys(table.index.get_level_values("reading")))
    looks: dict[str, style.Look] = {}
    for system in style.ordered(table.index.get_level_values("system"), style.SYSTEMS):
        colour, marker = style.system_look(system)
        looks[system] = {"color": colour, "marker": marker, "linestyle": ""}
    height = 0.9 + 0.13 * len(conditions)
    with charts.panels([""], ["ttft_s", "tpot_s"], height) as (figure, panels):
        for axes, _, metric in panels:
            times = table[metric].unstack()
            shares = times.div(times["planner"], axis=0).loc[conditions]
            for system, look in looks.items():
                axes.plot(shares[system], range(len(conditions)), **look, clip_on=False, zorder=3)
            axes.set(xscale="log", ylim=(len(conditions) - 0.5, -0.5))
            axes.set_xlabel(f"{style.METRICS[metric][0].split()[0]} (planner = 1)")
            least, most = shares.min(axis=None) * 0.9, shares.max(axis=None) * 1.1
            ticks = [one for one in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if least < one < most]
            axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            names = conditions if metric == "ttft_s" else []
            axes.set_yticks(range(len(conditions)), names or [""] * len(conditions), fontsize=SMALL)
        charts.legend(figure, {style.system_name(s): look for s, look in looks.items()}, columns=3)
        caption = draw_conditions.__doc__ or ""
        charts.write(figure, table.reset_index(), output, folder.name, caption)
