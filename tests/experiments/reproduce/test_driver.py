"""Reproduction: expansion of experiments, and the command at a tiny size."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from experiments.errors import UserError
from experiments.judge.frame import ResultsFolder
from experiments.reproduce import driver, parallel, sweeps
from experiments.reproduce.driver import made, write_experiment
from experiments.run.weights import SCALE_MODELS
from tests.command import ROOT, begun, carried_out, config

HERE = "tests.experiments.reproduce.test_driver"
TINY = ("workload.prompts=4", "workload.output_tokens=6", "workload.input_tokens=12")
FIRST = f"""# @package _global_
defaults:
  - override /testbed: rtx3090x6
experiment:
  id: "98"
  title: Two budgets, and one more run
  draws: {HERE}.draw
  cells:
    - [system=finemoe, system.search=semantic, memory_budget=6]
hydra: {{sweeper: {{params: {{system: "on_demand,resident", memory_budget: "6,12"}}}}}}
"""
SECOND = f"""# @package _global_
defaults:
  - override /testbed: rtx3090x6
experiment: {{id: "99a", title: Shared, draws: {HERE}.draw}}
hydra: {{sweeper: {{params: {{system: on_demand, memory_budget: "12,24"}}}}}}
"""
TABLE = f"""# @package _global_
experiment:
  id: table9
  title: Traces
  analysis: {HERE}.analyse
  draws: {HERE}.draw_folder
  models: [mixtral, qwen]
  datasets: [docs]
"""


def reproduce(words: list[str], conf: Path) -> Any:
    """Call the command in this process; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        driver.main(words, conf)
    return ended.value.code


def draw(frame: pd.DataFrame, place: Path, mixed_modes: bool) -> None:
    assert not mixed_modes
    name = "98" if "finemoe" in set(frame["system"]) else "99a"
    frame[["system", "memory_budget", "tpot_s"]].to_csv(place / f"{name}.csv", index=False)


def analyse(cfg: Any, traces: dict[tuple[str, str], Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    found = [f"{model} {dataset} {path.exists()}" for (model, dataset), path in traces.items()]
    (folder / "record.json").write_text(json.dumps([*found, list(cfg.experiment.models)]))


def draw_folder(folder: Path, place: Path, mixed_modes: bool) -> None:
    (place / "table9.csv").write_text((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's configs with three experiments of this file instead of its own."""
    folder = tmp_path_factory.mktemp("conf")
    for path in (ROOT / "conf").iterdir():
        if path.name != "experiment":
            (folder / path.name).symlink_to(path)
    (folder / "experiment").mkdir()
    for name, text in {"first": FIRST, "second": SECOND, "table": TABLE}.items():
        (folder / "experiment" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


PARAMS, CELLS = ["s=p,q", "m=6,12"], [["s=r", "x=1"], ["m=96"]]
SWEPT = ["s=p m=6", "s=p m=12", "s=q m=6", "s=q m=12"]


@pytest.mark.parametrize(
    ("params", "cells", "user", "expected"),
    [
        # Cells are multiplied with what they do not set.
        (PARAMS, CELLS, [], [*SWEPT, "s=r m=6 x=1", "s=r m=12 x=1", "s=p m=96", "s=q m=96"]),
        ([], CELLS, [], ["s=r x=1", "m=96"]),
        ([], [], [], [""]),
        # A user's override replaces the sweep of its key.
        (PARAMS, CELLS, ["m=24", "y=1"], ["s=p m=24 y=1", "s=q m=24 y=1", "s=r m=24 y=1 x=1"]),
        # A user's choice of a group leaves out the cells of others.
        (PARAMS, CELLS, ["s=r", "m=6"], ["s=r m=6", "s=r m=6 x=1"]),
        (PARAMS, CELLS[:1], ["s=q", "m=6"], ["s=q m=6"]),
    ],
)
def test_params_cells_and_overrides_are_combined(
    params: list[str], cells: list[list[str]], user: list[str], expected: list[str]
) -> None:
    combined = sweeps.combine(sweeps.parse(params), cells, sweeps.parse(user), {"s"})
    assert [" ".join(one) for one in combined] == expected


def test_figures_share_runs_by_digest(conf: Path) -> None:
    known = sweeps.available(conf)
    assert list(known) == ["98", "99a", "table9"]
    first = sweeps.run_configs(known["98"], TINY, conf)
    second = sweeps.run_configs(known["99a"], TINY, conf)
    cells = [f"{cfg.system.label} {cfg.memory_budget}" for cfg in first.values()]
    swept = ["on_demand 6", "on_demand 12", "resident 6", "resident 12"]
    assert cells == [*swept, "finemoe 6"]
    assert list(first.values())[-1].system.search == "semantic"
    assert all("experiment" not in cfg for cfg in first.values())
    assert first.keys() & second.keys() == {list(first)[1]}
    digest, cfg = next(iter(first.items()))
    cfg.system = {**cfg.system, "look": {"name": "other", "colour": "red", "marker": "o"}}
    assert sweeps.digest(cfg) == digest


def test_all_leaves_out_what_goes_beyond_the_paper() -> None:
    everything = sweeps.chosen(["all"])
    assert {one.beyond for one in everything} == {False}
    assert len(sweeps.chosen(["all", "frontier"])) == len(everything) + 1


def test_plain_values_compose_as_hydra_composes_them(conf: Path) -> None:
    known = sweeps.available(conf)["98"]
    overrides = [*TINY, "system=finemoe", "memory_budget=12", "system.store_capacity=7"]
    ours = sweeps.run_configs(known, overrides, conf)
    with initialize_config_dir(str(conf), version_base="1.3"):
        hydras = compose("config", ["experiment=first", *overrides])
    hydras.output = "anywhere"
    assert sweeps.digest(hydras) in ours


def test_the_last_run_of_every_sweep_and_every_cell_composes() -> None:
    for experiment in sweeps.available().values():
        for swept in (experiment.params, *experiment.cells):
            last = [values[-1] for values in sweeps.parse(swept).values()]
            cfg = config("config", f"experiment={experiment.name}", "output=unused", *last)
            assert str(cfg.experiment.id) == experiment.id


def command(conf: Path, results: Path, traces: Path, *more: str) -> list[str]:
    return ["98", *TINY, f"results={results}", f"traces={traces}", *more]


def latencies(results: Path) -> dict[str, float]:
    return {
        path.parent.name: json.loads(path.read_text())["summary"]["tpot_s"]["mean"]
        for path in results.glob("runs/*/run.json")
    }


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {one: one.stat().st_mtime_ns for one in folder.rglob(pattern) if one.is_file()}


def test_killed_in_the_middle_it_finishes_with_the_same_results_and_then_does_nothing(
    conf: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "killed"
    words = command(conf, results, traces, "n_jobs=2")
    call = f"import sys; from pathlib import Path; from experiments.reproduce.driver import main; \
             sys.exit(main({words!r}, Path({str(conf)!r})))"
    with begun("-c", call) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("runs: 1 of 5"):
                break
        process.send_signal(signal.SIGKILL)
        # Ends when the workers, which hold the pipe too, have ended.
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    # How many of the others were complete by then depends on the machine.
    kept = times(results, "run.json")
    assert kept
    assert not (results / "experiments").exists()

    assert reproduce(command(conf, results, traces, "n_jobs=1"), conf) == 0
    said = capsys.readouterr().out
    assert f"to do: 1 of 1 experiments, {5 - len(kept)} runs" in said
    assert f"runs made: {5 - len(kept)}, failures: 0, experiments drawn: 1 of 1" in said
    assert kept.items() <= times(results, "run.json").items()
    straight = tmp_path / "straight"
    assert reproduce(command(conf, straight, traces, "n_jobs=1"), conf) == 0
    assert len(latencies(straight)) == 5
    assert latencies(results) == latencies(straight)
    drawn = [one / "figures" / "98.csv" for one in (results, straight)]
    assert drawn[0].read_text() == drawn[1].read_text()

    before = times(results, "*")
    capsys.readouterr()
    assert reproduce(command(conf, results, traces), conf) == 0
    assert "nothing to run" in capsys.readouterr().out
    assert times(results, "*") == before

    # A malformed record is named, and nothing is overwritten.
    broken = next(iter(kept))
    broken.write_text("{")
    assert reproduce(command(conf, results, traces), conf) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken} is no run record: Expecting property name")
    assert broken.read_text() == "{"


@pytest.mark.skipif(torch.cuda.is_available(), reason="testbed=auto simulates without CUDA only")
def test_swept_records_are_taken(conf: Path, traces: Path, tmp_path: Path, capsys: Any) -> None:
    swept = tmp_path / "multirun"
    sweep = ["-m", "system=on_demand", "memory_budget=12,24", "verify=false"]
    carried_out(*sweep, *TINY, f"traces={traces}", f"hydra.sweep.dir={swept}")
    same = [*TINY, "verify=false", f"results={tmp_path / 'results'}", f"records={swept}"]
    assert reproduce(["99a", *same, f"traces={traces}", "n_jobs=1"], conf) == 0
    said = capsys.readouterr().out
    assert "taken from" in said
    assert "2 of 2 runs\nto do: 1 of 1 experiments, 0 runs" in said
    drawn = pd.read_csv(tmp_path / "results" / "figures" / "99a.csv")
    assert sorted(drawn["memory_budget"]) == [12, 24]
    missing = f"records={tmp_path / 'none'}"
    assert reproduce(["98", *same[:-1], missing], conf) == 2
    assert "none is no folder" in capsys.readouterr().err


def test_one_bad_run_stops_no_other(conf: Path, traces: Path, tmp_path: Path, capsys: Any) -> None:
    words = command(conf, tmp_path, traces, "system=on_demand", "memory_budget=0.1,12", "n_jobs=1")
    assert reproduce(words, conf) == 2
    said = capsys.readouterr().out
    assert "experiment 98: not drawn, 1 of its runs are missing" in said
    assert "runs made: 1, failures: 1, experiments drawn: 0 of 1" in said
    assert len(list(tmp_path.glob("runs/*/run.json"))) == 1
    assert not (tmp_path / "experiments").exists()


def test_new_weights_are_noticed(conf: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    model = tmp_path / "scale" / "mixtral"
    shutil.copytree(SCALE_MODELS / "mixtral", model)
    for module in ("weights", "models"):
        monkeypatch.setattr(f"experiments.run.{module}.SCALE_MODELS", model.parent)
    kept = tmp_path / "traces"
    words = command(conf, tmp_path, kept, "system=on_demand", "memory_budget=12", "n_jobs=1")
    assert reproduce(words, conf) == 0
    (record,) = tmp_path.glob("runs/*/run.json")
    first = json.loads(record.read_text())
    capsys.readouterr()
    assert reproduce(words, conf) == 0
    assert "nothing to run" in capsys.readouterr().out

    tensors = load_file(model / "model.safetensors")
    gate = next(name for name in tensors if name.endswith("gate.weight"))
    tensors[gate] = -tensors[gate]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert reproduce(words, conf) == 0
    assert "to do: 1 of 1 experiments, 1 runs" in capsys.readouterr().out
    again = json.loads(record.read_text())
    assert again["config"] == first["config"]
    assert again["weights_fingerprint"] != first["weights_fingerprint"]
    # Nothing was recorded over: the weights of before would find their routing again.
    assert len(list(kept.glob("*.parquet"))) == 2


def test_an_analysis_gets_its_traces_and_draws(conf: Path, traces: Path, tmp_path: Path) -> None:
    words = ["table9", *TINY, f"results={tmp_path}", f"traces={traces}", "model=mixtral"]
    assert reproduce([*words, "n_jobs=1"], conf) == 0
    found = json.loads((tmp_path / "figures" / "table9.csv").read_text())
    assert found == ["mixtral docs True", ["mixtral"]]
    said = json.loads((tmp_path / "experiments" / "table9.json").read_text())
    assert (said["id"], said["kind"], said["overrides"][-1]) == ("table9", "analysis", words[-1])
    assert said["files"] == ["analysis/table9/record.json", "figures/table9.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["77"], "error: unknown experiment 77; choose all, or some of 98, 99a, table9\n"),
        ([], "error: which experiment?"),
        (["98", "launcher=slurm"], "launcher=joblib or ray"),
        (["98", "no_such=1"], "no_such"),
        (["99a", "results=/proc/nowhere"], "error: cannot write to /proc/nowhere: "),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str], message: str, conf: Path, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce(words, conf) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def fail(kind: str) -> None:
    if kind != "well":
        raise {"bad": UserError, "broken": RuntimeError}[kind](f"{kind}\nsecond line")


@pytest.mark.parametrize(("launcher", "n_jobs"), [("joblib", 1), ("joblib", 2), ("ray", 2)])
def test_failures_come_back_from_workers(launcher: str, n_jobs: int) -> None:
    if launcher == "ray":
        pytest.importorskip("ray")
    tasks = {kind: partial(fail, kind) for kind in ("well", "bad", "broken")}
    ends = {one.name: one for one in parallel.side_by_side(tasks, launcher, n_jobs)}
    assert ends["well"] == parallel.Outcome("well")
    assert ends["bad"].bad_input
    assert not ends["broken"].bad_input
    assert ends["broken"].error == "RuntimeError: broken"
    assert "second line" in str(ends["broken"].trace)


def die(quickly: bool) -> None:
    if quickly:
        os._exit(9)


def test_a_killed_worker_fails_its_task_and_is_replaced() -> None:
    killed, after = {"killed": partial(die, True)}, {"after": partial(die, False)}
    assert list(parallel.side_by_side(killed, "joblib", 2)) == [
        parallel.Outcome("killed", parallel.KILLED)
    ]
    assert list(parallel.side_by_side(after, "joblib", 2)) == [parallel.Outcome("after")]


def test_an_experiment_whose_figure_is_gone_is_made_again(tmp_path: Path) -> None:
    results, picture = ResultsFolder(tmp_path), tmp_path / "figures" / "98.csv"
    picture.parent.mkdir()
    picture.write_text("drawn")
    write_experiment(results, "98", {"source": "here", "runs": []})
    assert made(results, "98", "here")
    assert not made(results, "98", "elsewhere")
    picture.unlink()
    assert not made(results, "98", "here")


def test_an_option_that_sets_more_than_its_group_is_composed_whole(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    own = (folder / "system" / "on_demand.yaml").read_text().replace("\n", "\n  ")
    text = f"# @package _global_\nmine: 3\nsystem:\n  {own}"
    (folder / "system" / "wide.yaml").write_text(text)
    words = ["system=wide", "workload.batch_size=1"]
    (cfg,) = sweeps.run_configs(sweeps.available(folder)["16b"], words, folder).values()
    assert (cfg.system.label, cfg.mine) == ("on_demand", 3)
