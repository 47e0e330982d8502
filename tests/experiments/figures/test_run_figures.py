from pathlib import Path

import pandas as pd
import pytest
from hydra.utils import get_method

from experiments.errors import UserError
from experiments.judge.frame import run_frame
from experiments.reproduce.sweeps import available
from tests.experiments.judge.test_frame import leave_run

pytestmark = pytest.mark.usefixtures("coarse")
DRAWS = {one.id: get_method(one.draws) for one in available().values() if not one.analysis}


def drawn(name: str, frame: pd.DataFrame, place: Path, mixed_modes: bool = False) -> pd.DataFrame:
    """Draw a figure; return the data beside it."""
    DRAWS[name](frame, place, mixed_modes)
    return pd.read_csv(place / f"{name}.csv", dtype={"digest": str})


def frame_of(tmp_path: Path, *runs: tuple[str, ...]) -> pd.DataFrame:
    folders = [tmp_path / f"run{number}" for number in range(len(runs))]
    for folder, overrides in zip(folders, runs, strict=True):
        leave_run(folder, *overrides)
    return run_frame(folders)


@pytest.mark.parametrize("name", DRAWS)
def test_without_records_a_figure_says_what_to_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"run python -m experiments.reproduce {name}$"):
        drawn(name, pd.DataFrame(), tmp_path / "figures")
    # Records of another kind are none either.
    if name in ("11", "14b", "15", "17", "ablation"):
        with pytest.raises(UserError, match="no run records"):
            drawn(name, frame_of(tmp_path, ("system=on_demand",)), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_mixed_modes_are_refused_or_marked(tmp_path: Path) -> None:
    records = leave_run(tmp_path / "a"), leave_run(tmp_path / "b", mode="measured")
    frame = run_frame(records)
    with pytest.raises(UserError, match="figure 13 mixes measured and simulated"):
        drawn("13", frame, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
    data = drawn("13", frame, tmp_path / "figures", mixed_modes=True)
    assert set(data["series"]) == {"FineMoE (measured)", "FineMoE (simulated)"}
    assert "Mode: measured, simulated" in (tmp_path / "figures" / "13.txt").read_text()


def test_two_records_of_one_cell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are of one cell"):
        drawn("10", frame_of(tmp_path, (), ("seed=1",)), tmp_path)


def test_the_parts_of_an_iteration_add_up(tmp_path: Path) -> None:
    parts = drawn("17", frame_of(tmp_path, ()), tmp_path).set_index("part")["milliseconds"]
    # 12 s of three batches of 5 iterations; 4 s of waiting, 0.3 s of collecting.
    assert parts["iteration"] == pytest.approx(12e3 / 15)
    assert parts["on_demand_wait"] == pytest.approx(4e3 / 15)
    assert parts["rest"] == pytest.approx(7.7e3 / 15)
    assert parts.isna().sum() == 3


def test_tau_is_one_where_routings_rank_alike_and_less_where_not(tmp_path: Path) -> None:
    real = "model=qwen3", "routing=a/real.npz"
    systems = [f"system={name}" for name in ("on_demand", "lfu", "finemoe", "oracle")]
    frame = frame_of(tmp_path, *((one,) for one in systems), *((one, *real) for one in systems))
    frame["weights"] = ["scale"] * 4 + ["hub"] * 4
    frame["hit_rate"], frame["tpot_s"] = [0.1, 0.2, 0.3, 0.0] * 2, [4, 3, 2, 1, 2, 3, 4, 1]
    drawn("real-routing", frame, tmp_path)
    caption = (tmp_path / "real-routing.txt").read_text()
    assert "in Expert hit rate (%): real 1.00 (1.00 to 1.00)." in caption
    assert "in TPOT (ms): real -1.00 (-1.00 to -1.00)." in caption
