"""The command line, end to end: records, sweeps, stores, W&B, interruption."""

import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.errors import UserError, file_errors
from experiments.run.records import alone_in, git_state, new_folder, other_code, sweep_folder
from tests.command import SMALL, begun, carried_out, python, record_of, refusal, run_command
from tests.engine import saved_mixtral


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    carried_out(*sweep_arguments(folder))
    return folder


def sweep_arguments(folder: Path) -> list[str]:
    folders = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${system.label}"]
    return ["-m", "system=finemoe,on_demand,resident", "memory_budget=6", *SMALL, *folders]


def test_a_sweep_leaves_complete_lossless_records(sweep: Path) -> None:
    records = {system: record_of(sweep / system) for system in ("finemoe", "on_demand", "resident")}
    for system, record in records.items():
        summary = record["summary"]
        facts = [record[key] for key in ("status", "mode", "system")]
        assert facts == ["complete", "emulated", system]
        assert [record[k] for k in ("model", "weights", "dataset")] == ["mixtral", "scale", "docs"]
        assert summary["lossless"] is True
        assert summary["peak_slot_bytes"] <= summary["slot_budget_bytes"]
        assert summary["ttft_s"]["mean"] > 0
        assert summary["tpot_s"]["p99"] >= summary["tpot_s"]["p50"] > 0
    demand, finemoe = records["on_demand"]["summary"], records["finemoe"]["summary"]
    assert demand["bytes_prefetched"] == demand["late"] == 0
    assert finemoe["bytes_prefetched"] > 0
    assert records["resident"]["summary"]["expert_hit_rate"] == 1
    assert len({record["dataset_sha256"] for record in records.values()}) == 1


def test_every_request_has_a_row_with_the_tokens_asked_for(sweep: Path) -> None:
    finemoe, demand = (
        pd.read_parquet(sweep / one / "requests.parquet") for one in ("finemoe", "on_demand")
    )
    assert finemoe[["input_tokens", "output_tokens"]].to_numpy().tolist() == [[12, 4]] * 2
    assert [list(t) for t in finemoe["tokens"]] == [list(t) for t in demand["tokens"]]
    summary = record_of(sweep / "finemoe")["summary"]
    for kind in ("hits", "late", "misses"):
        assert finemoe[kind].sum() == summary[kind]


def test_a_sweep_started_again_skips_complete_runs_and_redoes_the_rest(sweep: Path) -> None:
    untouched = sweep / "on_demand" / "run.json"
    before = untouched.stat().st_mtime_ns
    (sweep / "finemoe" / "run.json").unlink()
    assert carried_out(*sweep_arguments(sweep)).count("already complete") == 2
    assert untouched.stat().st_mtime_ns == before
    assert record_of(sweep / "finemoe")["status"] == "complete"


def test_a_sweep_over_processes_exits_as_its_jobs_did(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}"]
    done = python("run.py", "-m", *launcher, "testbed=rtx3090x6", "weights=/nowhere", "seed=0,1")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: weights=/nowhere is neither") == 2


def test_an_output_that_holds_another_run_is_not_overwritten(sweep: Path) -> None:
    done = run_command(*SMALL, "memory_budget=12", f"output={sweep / 'finemoe'}")
    assert "another config" in refusal(done)
    assert record_of(sweep / "finemoe")["memory_budget_gb"] == 6


def test_store_devices_batches_and_wandb(tmp_path: Path, tmp_path_factory: Any) -> None:
    store = tmp_path / "maps.safetensors"
    # A path of more than 64 characters is no tag that W&B takes.
    weights = saved_mixtral(tmp_path_factory.mktemp("m") / "m", 3)
    base = [*SMALL, f"weights='{weights}'", "memory_budget=50%", "testbed.devices=3"]
    base += ["workload.batch_size=2", "workload.repeats=2"]
    carried_out(*base, f"store.save={store}", f"output={tmp_path / 'saved'}", "logger=wandb")
    saved = record_of(tmp_path / "saved")
    assert saved["summary"]["lossless"] is True
    assert saved["slots"] == [2, 2, 2]
    assert len(pd.read_parquet(tmp_path / "saved" / "requests.parquet")) == 4
    assert list((tmp_path / "saved").glob("wandb/offline-run-*/*.wandb"))
    carried_out(*base, f"store.load={store}", f"output={tmp_path / 'loaded'}")
    assert record_of(tmp_path / "loaded")["summary"]["bytes_prefetched"] > 0


def test_an_interrupted_run_leaves_no_record(tmp_path: Path) -> None:
    words = ("run.py", "workload=quick", "testbed=emulated", f"output={tmp_path}")
    with begun(*words, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("prompts from"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # Ends when the workers, which hold the pipes too, have ended; recording takes minutes.
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("system=no_such_system", "Available options in 'system': belady"),
        ("output=a=1,b=2", """is quoted: 'output="a=1,b=2"'"""),
        ("hydra/launcher=submitit_nowhere", "pip install -e '.[slurm]'"),
        ("-m hydra.sweep.dir=run.py/x", "run.py/x: not a directory; choose another folder"),
        ("-m experiment=figure3a", "call python -m experiments.reproduce 3a"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: str, message: str, tmp_path: Path) -> None:
    done = run_command(*words.format(tmp_path).split())
    assert done.returncode == 2, done.stderr
    lines = [one for one in done.stderr.splitlines() if not one.startswith("Error executing")]
    assert all(line.startswith("error: ") for line in lines)
    assert message in lines[0]


def test_jobs_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({new_folder(tmp_path) for _ in range(20)}) == 20
    long = ["a=" + "ä" * 200 + end for end in "xy"]
    folders = [sweep_folder(tmp_path, one) for one in ("a=1,b=2", *long)]
    for folder in folders:
        folder.mkdir()
    assert folders[0].name == "a=1,b=2"


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with alone_in(tmp_path):
            order.append("second")

    other = threading.Thread(target=second)
    with alone_in(tmp_path):
        other.start()
        other.join(timeout=0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_a_record_of_other_code_is_said() -> None:
    now = git_state()
    assert other_code({**now, "git_commit": "0123456789"}) is not None
    assert (other_code(now) is None) == (not now["git_dirty"])


def test_a_full_disk_is_bad_input() -> None:
    with pytest.raises(UserError, match="no space left on device; free"), file_errors():
        Path("/dev/full").write_text("much")
