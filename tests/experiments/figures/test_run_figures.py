from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments.errors import UserError
from experiments.figures import charts, style
from experiments.judge.frame import run_frame
from tests.command import config
from tests.experiments.judge.test_frame import leave_run

FIGURES = ("1b", "10", "11", "12", "13", "14a", "14b", "15", "16b", "17")
# Overrides of a few runs that each figure can be drawn from, without every cell of its sweep.
RUNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "1b": (("system=finemoe",), ("system=resident",)),
    "10": (("system=finemoe",), ("system=deepspeed",), ("system=finemoe", "model=qwen")),
    "11": (("system=finemoe", "+workload.rate=1"), ("system=promoe", "+workload.rate=1")),
    "12": (("memory_budget=6",), ("memory_budget=12",), ("memory_budget=6", "system=promoe")),
    "13": (("system=finemoe",), ("system=finemoe", "dataset=code")),
    "14a": (("system=moe_infinity",), ("system.search=trajectory", "system.selection=top_k"), ()),
    "14b": (("system.eviction=lru",), ("system.eviction=lfu",), ()),
    "15": (("system.prefetch_distance=1",), ("system.prefetch_distance=8",)),
    "16b": (("workload.batch_size=1",), ("workload.batch_size=8",)),
    "17": ((), ("model=phi",)),
}


def drawn(name: str, frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> style.Drawn:
    module = importlib.import_module(f"experiments.figures.figure{name}")
    return module.draw(frame, place, mixed_modes=mixed_modes)


def frame_of(tmp_path: Path, name: str) -> pd.DataFrame:
    folders = [tmp_path / f"run{number}" for number in range(len(RUNS[name]))]
    for folder, overrides in zip(folders, RUNS[name], strict=True):
        leave_run(folder, *overrides)
    return run_frame(folders)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_from_records(tmp_path: Path, name: str) -> None:
    frame = frame_of(tmp_path, name)
    found = drawn(name, frame, tmp_path / "figures")
    assert found.png == tmp_path / "figures" / f"{name}.png"
    assert found.pdf.read_bytes().startswith(b"%PDF")
    assert np.asarray(Image.open(found.png).convert("L")).std() > 1
    data = pd.read_csv(found.csv)
    assert set(data["digest"]) == set(frame["digest"])


@pytest.mark.parametrize("name", FIGURES)
def test_without_records_a_figure_says_what_to_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"run python -m experiments.reproduce {name}$"):
        drawn(name, pd.DataFrame(), tmp_path / "figures")
    # Records of another kind are none either.
    if name in ("11", "14b", "15", "17"):
        leave_run(tmp_path / "a", "system=on_demand")
        with pytest.raises(UserError, match="no run records"):
            drawn(name, run_frame([tmp_path / "a"]), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_the_data_beside_a_figure_are_those_of_the_records(tmp_path: Path) -> None:
    found = drawn("12", frame_of(tmp_path, "12"), tmp_path)
    data = pd.read_csv(found.csv).set_index(["system", "limit_gb"])
    assert data.loc[("finemoe", 6.0), "tpot_s"] == pytest.approx(0.2)
    assert data.loc[("promoe", 6.0), "tpot_s_high"] == pytest.approx(0.3)
    assert len(data) == 3


def test_mixed_modes_are_refused_or_marked(tmp_path: Path) -> None:
    leave_run(tmp_path / "a")
    leave_run(tmp_path / "b", mode="measured")
    frame = run_frame([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="figure 13 mixes measured and simulated"):
        drawn("13", frame, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
    found = drawn("13", frame, tmp_path / "figures", mixed_modes=True)
    assert "Mode: measured, simulated" in found.caption
    assert set(pd.read_csv(found.csv)["series"]) == {"FineMoE (measured)", "FineMoE (simulated)"}
    marked = charts.looks(charts.checked(frame, "13", mixed_modes=True))
    assert len({look["hatch"] for look in marked.values()}) == 2
    assert len({look["linestyle"] for look in marked.values()}) == 2


def test_two_records_of_one_cell_are_refused(tmp_path: Path) -> None:
    leave_run(tmp_path / "a")
    leave_run(tmp_path / "b", "seed=1")
    with pytest.raises(UserError, match="are of one cell"):
        drawn("10", run_frame([tmp_path / "a", tmp_path / "b"]), tmp_path)


def test_the_oracle_of_figure_10_is_a_line_and_no_system(
    tmp_path: Path, saved: list[Figure]
) -> None:
    leave_run(tmp_path / "a")
    leave_run(tmp_path / "b", "system=oracle", tpots=(0.02, 0.05, 0.08))
    found = drawn("10", run_frame([tmp_path / "a", tmp_path / "b"]), tmp_path)
    assert set(pd.read_csv(found.csv)["system"]) == {"finemoe", "oracle"}
    ttft, tpot, hits = saved[0].axes
    assert [len(axes.patches) for axes in (ttft, tpot, hits)] == [1, 1, 1]
    # The oracle's 50 ms, across the bar.
    line = np.asarray(tpot.collections[-1].get_paths()[0].vertices, dtype=float)
    np.testing.assert_allclose(line, [[-0.46, 50], [0.46, 50]])
    drawn("10", run_frame([tmp_path / "b"]), tmp_path / "alone")
    assert len(saved[1].axes[0].patches) == 1


def test_another_ablation_is_no_approach_of_figure_14a(tmp_path: Path) -> None:
    leave_run(tmp_path / "a")
    leave_run(tmp_path / "b", "system.eviction=lru")
    leave_run(tmp_path / "c", "system.selection=top_k")
    frame = run_frame([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    found = drawn("14a", frame, tmp_path)
    data = pd.read_csv(found.csv).set_index("digest")["approach"]
    assert data.to_dict() == {"a": "Map (T+S+δ)", "c": "Map (T+S)"}


def test_the_parts_of_an_iteration_add_up(tmp_path: Path) -> None:
    leave_run(tmp_path / "a")
    data = pd.read_csv(drawn("17", run_frame([tmp_path / "a"]), tmp_path).csv)
    parts = data.set_index("part")["milliseconds"]
    # 12 s of three batches of 11 iterations; 6 s of waiting, 1 s of collecting.
    assert parts["iteration"] == pytest.approx(12e3 / 33)
    assert parts["on_demand_wait"] == pytest.approx(6e3 / 33)
    assert parts["rest"] == pytest.approx(5e3 / 33)
    assert parts.isna().sum() == 3


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, "14b")
    one, two = (drawn("14b", frame, tmp_path / place) for place in ("x", "y"))
    assert one.png.read_bytes() == two.png.read_bytes()
    assert one.pdf.read_bytes() == two.pdf.read_bytes()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    leave_run(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write figures to .*/file/figures") as caught:
        drawn("14b", run_frame([tmp_path / "a"]), tmp_path / "file" / "figures")
    assert "\n" not in str(caught.value)


def test_figure_14a_has_a_cell_for_each_approach(tmp_path: Path) -> None:
    cells = [list(cell) for cell in config("config", "experiment=figure14a").experiment.cells]
    for number, cell in enumerate(cells):
        leave_run(tmp_path / str(number), *cell)
    frame = run_frame([tmp_path / str(number) for number in range(len(cells))])
    data = pd.read_csv(drawn("14a", frame, tmp_path).csv, dtype={"digest": str})
    found = data.set_index("digest")["approach"].sort_index().tolist()
    assert found == ["Speculate", "Hit count", "Map (T)", "Map (T+S)", "Map (T+S+δ)"]


def test_a_line_breaks_where_a_record_is_missing() -> None:
    frame = pd.DataFrame({"x": [4.0, 1.0], "tpot_s": [0.2, 0.1]})
    frame = frame.assign(tpot_s_low=frame["tpot_s"], tpot_s_high=frame["tpot_s"])
    look = {"color": "red", "marker": "o", "linestyle": "-"}
    with style.canvas(1, 1, 2, 2) as figure:
        charts.line(figure.axes[0], frame, "x", "tpot_s", look, [1.0, 2.0, 4.0])
        drawn_y = np.asarray(figure.axes[0].lines[0].get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn_y, [100.0, np.nan, 200.0])
