import json
import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.judge.frame import ResultsFolder, run_frame
from experiments.run.records import read_record, write_record
from tests.command import config

PROVENANCE = {
    "date": "2026-01-01T00:00:00+00:00",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "machine": {"cpu": "a cpu", "cores": 2, "memory_gb": 8.0, "gpus": [], "system": "Linux"},
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
}


@lru_cache
def settings_of(*overrides: str) -> Any:
    """Return the resolved config of a simulated run, as data; not to be changed."""
    composed = config("config", "testbed=rtx3090x6", "output=unused", *overrides)
    return OmegaConf.to_container(composed, resolve=True)


def leave_run(
    folder: Path,
    *overrides: str,
    batches: Sequence[int] = (0, 1, 2),
    tpots: Sequence[float] = (0.1, 0.2, 0.3),
    hits: Sequence[int] = (1, 2, 3),
    mode: str = "simulated",
    budget_gb: float = 22.5,
    **changed: Any,
) -> Path:
    """Leave the record of a run of 5 tokens a request, 10 expert accesses a batch; return it."""
    table = pd.DataFrame({"request": range(len(batches)), "batch": batches, "tpot_s": tpots})
    table = table.assign(input_tokens=5, output_tokens=5, hits=hits, late=1)
    table["ttft_s"], table["e2el_s"] = 10 * table["tpot_s"], 20 * table["tpot_s"]
    table["misses"] = 9 - table["hits"]
    summary: Any = table.drop_duplicates("batch")[["hits", "late", "misses"]].sum().to_dict()
    summary |= {"expert_hit_rate": summary["hits"] / sum(summary.values()), "lossless": None}
    for name in ("ttft_s", "tpot_s", "e2el_s"):
        summary[name] = {"mean": float(table[name].mean()), "ci95": [0.0, 99.0]}
    sizes = {"bytes_prefetched": 3.0, "bytes_on_demand": 6.0, "bytes_wasted": 1.5}
    sizes |= {"slot_budget_bytes": 25.0, "peak_slot_bytes": budget_gb, "dense_bytes": 3.0}
    summary |= {name: int(gb * 1e9) for name, gb in sizes.items()}
    summary |= {"bound": {"compute_s": 2.0, "link_s": 8.0, "times": 1.25}, "busy_seconds": 10.0}
    phases = {"context_collection": 0.3, "on_demand_wait": 4.0, "prefetch_wait": 0.0}
    summary |= {"phase_seconds": phases, **changed}
    settings = settings_of(*overrides)
    record = {"config": settings, "summary": summary, "status": "complete"}
    record |= {"system": settings["system"]["label"], "model": settings["model"]["name"], "seed": 0}
    record |= {"testbed": "6 x RTX 3090", "weights": "scale", "routing": "a trace", "mode": mode}
    record |= {"dataset": settings["dataset"]["name"], "dataset_sha256": "ab" * 32}
    record |= {"dataset_source": "somewhere", "memory_budget_gb": budget_gb}
    folder.mkdir(parents=True, exist_ok=True)
    return write_record(folder, {**record, **PROVENANCE}, table)


def only(frame: pd.DataFrame) -> dict[str, Any]:
    (row,) = frame.to_dict("records")
    return {str(key): value for key, value in row.items()}


def test_a_run_becomes_a_row(tmp_path: Path) -> None:
    path = leave_run(tmp_path / "abc", "memory_budget=25%")
    row = only(run_frame([tmp_path / "abc"]))
    expected: dict[str, Any] = {"digest": "abc", "system": "finemoe", "label": "finemoe"}
    expected |= {"model": "mixtral", "dataset": "docs", "mode": "simulated", "path": str(path)}
    expected |= {"memory_budget": "25%", "memory_budget_gb": 22.5, "batch_size": 1}
    expected |= {"prefetch_distance": 3, "store_capacity": 1000, "bytes_prefetched": 3 * 10**9}
    expected |= {"hits": 6, "late": 3, "misses": 21, "bound_times": 1.25, "busy_s": 10.0}
    assert {key: row[key] for key in expected} == expected
    assert [row[key] for key in ("tpot_s", "hit_rate")] == pytest.approx([0.2, 0.2])
    assert row["phase_on_demand_wait_s"] == 4.0
    assert math.isnan(row["phase_search_s"])


def test_simulated_runs_of_the_same_requests_replay_one_routing(tmp_path: Path) -> None:
    def left(name: str, tokens: list[int], *overrides: str, mode: str = "simulated") -> Path:
        path = leave_run(tmp_path / name, *overrides, mode=mode)
        table = pd.read_parquet(path.parent / "requests.parquet")
        return write_record(
            path.parent, read_record(path), table.assign(tokens=pd.Series([tokens] * 3))
        )

    one, same = left("one", [1, 2]), left("same", [1, 2], "system=on_demand")
    larger, live = (
        left("larger", [1, 3], "workload.batch_size=4"),
        left("l", [1, 4], mode="emulated"),
    )
    assert len(run_frame([one, same, larger, live])) == 4
    with pytest.raises(UserError, match="replay different routing of the same requests"):
        run_frame([one, same, left("other", [1, 3], "system=promoe")])


def test_requests_of_one_batch_are_no_independent_samples(tmp_path: Path) -> None:
    leave_run(tmp_path / "two", batches=(0, 0, 1), tpots=(0.1, 0.1, 0.3), hits=(1, 1, 3))
    leave_run(tmp_path / "one", batches=(0, 0, 0), tpots=(0.1, 0.1, 0.1), hits=(1, 1, 1))
    two, one = run_frame([tmp_path / "two", tmp_path / "one"]).to_dict("records")
    # Two batches of 5 iterations, of 2 and 6 seconds.
    assert (two["iterations"], two["iteration_s"]) == (10, pytest.approx(8 / 10))
    # Only three resamples of two batches exist: the one, both, the other.
    for name, ends in (("tpot_s", (0.1, 0.3)), ("hit_rate", (0.1, 0.3)),
                       ("iteration_s", (2 / 5, 6 / 5))):  # fmt: skip
        assert (two[f"{name}_low"], two[f"{name}_high"]) == pytest.approx(ends)
        assert math.isnan(one[f"{name}_low"])


@pytest.mark.parametrize(
    ("system", "options", "label"),
    [
        ("finemoe", ["prefetch_distance=3"], "finemoe"),
        ("finemoe", ["search=trajectory", "selection=top_k"], "finemoe search=trajectory "
         "selection=top_k"),
        ("on_demand", [], "on_demand"),
    ],
)  # fmt: skip
def test_labels_name_options(tmp_path: Path, system: str, options: list[str], label: str) -> None:
    leave_run(tmp_path / "a", f"system={system}", *(f"system.{one}" for one in options))
    assert only(run_frame([tmp_path / "a"]))["label"] == label


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    assert run_frame([]).empty
    with pytest.raises(UserError, match=r"no run record; give folders"):
        run_frame([tmp_path])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is no run record"):
        run_frame([tmp_path])
    leave_run(tmp_path / "a")
    (tmp_path / "a" / "requests.parquet").write_text("torn")
    with pytest.raises(UserError, match=r"is not what the run wrote; remove the folder"):
        run_frame([tmp_path / "a"])


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        (["config", "seed"], "${oc.env:HOME}", "'config': Value error, an interpolation"),
        (["config", "model", "name"], "../../else", "'config.model.name': Value error, a path"),
        (["model"], "\x1b[2J", "'model': String should match"),
        (["summary", "tpot_s", "mean"], math.nan, "'summary.tpot_s.mean': Input should be a fin"),
    ],
)
def test_odd_records_are_refused(tmp_path: Path, path: list[str], value: Any, cause: str) -> None:
    record = leave_run(tmp_path / "a")
    content = json.loads(record.read_text())
    reduce(getitem, path[:-1], content)[path[-1]] = value
    record.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"is no run record: {cause}.*; choose another") as caught:
        read_record(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda table: table.drop(columns="batch"), "no numbers as batch"),
        (lambda table: table.assign(hits="many"), "no numbers as hits"),
        (lambda table: table.head(0), "no requests"),
        (lambda table: table.loc[table.index.repeat(10**6)], "unpack to"),
    ],
)
def test_odd_tables_are_refused(tmp_path: Path, change: Any, cause: str) -> None:
    record = leave_run(tmp_path / "a")
    table = pd.read_parquet(record.parent / "requests.parquet")
    change(table).to_parquet(record.parent / "requests.parquet", compression="zstd")
    with pytest.raises(UserError, match="is not what the run wrote; remove the folder"):
        read_record(record)
    content = {k: v for k, v in json.loads(record.read_text()).items() if k != "requests_sha256"}
    record.write_text(json.dumps(content))
    assert read_record(record) == content
    with pytest.raises(UserError, match=f"cannot be read: .*{cause}.*; remove the folder"):
        run_frame([record])


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    index = tmp_path / "experiments" / "10.json"
    for content in ('{"runs": ["../../else"]}', '{"runs": {"a": 1}}', "[]", "null", "[" * 10**5):
        index.write_text(content)
        with pytest.raises(UserError, match=r"is no experiment record: .*; remove it"):
            ResultsFolder(tmp_path).runs_of("10")
