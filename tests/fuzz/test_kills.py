"""Commands stopped at random times: nothing corrupt or left behind, the same numbers later.

With `make fuzz` only. What every run of the tests kills is in `test_driver`, and interrupts, in
`test_run`.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.trace import TraceReader
from tests.command import begun
from tests.fuzz import fuzzed

TINY = (
    *("testbed=rtx3090x6", "memory_budget=6,12", "traces={folder}/traces", "workload.prompts=4"),
    *("workload.input_tokens=12", "workload.output_tokens=4"),
)
FIGURE = ("12", "model=mixtral", "system=on_demand", "n_jobs=2", "results={folder}/results")
KINDS = {
    "sweep": [
        *("run.py", "-m", *TINY, "hydra.sweep.dir={folder}/sweep"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    ],
    "reproduce": ["-m", "experiments.reproduce", *FIGURE, *TINY],
}
END_SECONDS = 60
MOST = 5
"""How often a command is stopped."""
Numbers = dict[str, Any]


def begin(kind: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command that prints errors to its output, too."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    words = [word.format(folder=folder) for word in KINDS[kind]]
    return begun(*words, env=env, stderr=subprocess.STDOUT)


def carried_out(kind: str, folder: Path) -> Numbers:
    """Carry a command out; return what its runs came to by config."""
    with begin(kind, folder) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert not list(folder.rglob("*.partial"))
    return numbers(folder)


def numbers(folder: Path) -> Numbers:
    """Read all that a command left, which must be sound; return what runs came to by config."""
    found = {}
    for path in folder.rglob("run.json"):
        record = json.loads(path.read_text())
        assert record["status"] == "complete"
        table = pd.read_parquet(path.parent / "requests.parquet")
        summary = {key: value for key, value in record["summary"].items() if key != "bound"}
        found[f"{record['system']} {record['memory_budget_gb']}"] = summary, table.to_json()
    for path in folder.rglob("traces/[!.]*.parquet"):
        assert list(TraceReader(path).requests())
    for path in folder.rglob("experiments/*.json"):
        assert json.loads(path.read_text())["files"]
    return found


@cache
def undisturbed(kind: str) -> tuple[Numbers, float]:
    """Return what a command comes to if nothing stops it, and how many seconds it takes."""
    began = time.monotonic()
    return carried_out(kind, Path(mkdtemp(prefix="whole-"))), time.monotonic() - began


KILLS = st.tuples(
    st.sampled_from((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)),
    st.integers(0, 99).map(lambda percent: (percent + 50) % 100),
)
"""A signal, and after how much of the time that the command would take."""


@pytest.mark.skipif("FUZZ" not in os.environ, reason="takes minutes")
@fuzzed(1)
@given(st.sampled_from(list(KINDS)), st.lists(KILLS, min_size=1, max_size=MOST))
def test_what_is_stopped_goes_on(kind: str, kills: list[tuple[signal.Signals, int]]) -> None:
    expected, seconds = undisturbed(kind)
    folder = Path(mkdtemp(prefix=f"{kind}-"))
    for number, percent in kills:
        with begin(kind, folder) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(percent / 100 * seconds)
            process.send_signal(number)
            # Ends when all descendants have ended.
            said, _ = process.communicate(timeout=END_SECONDS)
        # Before the command takes over, the interpreter ends as the signal says.
        assert process.returncode in (0, 128 + number, -number), said
        if process.returncode == 128 + number:
            assert "interrupted; " in said
            assert "Traceback" not in said, said
        assert numbers(folder).items() <= expected.items()
    assert carried_out(kind, folder) == expected
