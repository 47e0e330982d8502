"""A model, a workload and a backend from outside the project: one file and one YAML each.

A system is tested by the page that tells how to add one, figures and claims beside the project's.
"""

from pathlib import Path

import pandas as pd
import pytest

from tests.command import carried_out, record_of

FILES = {
    "conf/model/tiny.yaml": """
name: tiny
hub_id: nobody/tiny
dtype: bfloat16
layers: 2
experts: 4
top_k: 1
hidden_size: 8
expert_intermediate_size: 16
prefetch_distance: 1
dummy_tokenizer: mixtral
full_size:
  num_attention_heads: 2
  num_key_value_heads: 2
  head_dim: 4
  shared_expert_intermediate_size: 0
  vocab_size: 32
""",
    "conf/system/twice.yaml": """
_target_: baselines.on_demand.OnDemandPolicy
label: twice
backend: outside.prepare_twice
""",
    "conf/workload/backwards.yaml": "_target_: outside.Backwards\n",
    "outside.py": '''
from contextlib import contextmanager
from typing import ClassVar

from pydantic.dataclasses import dataclass

from experiments.run import replay
from experiments.run.schedule import FixedBatches, Request
from experiments.run.workloads import Workload, WorkloadSettings, origin_in


@dataclass(frozen=True)
class Backwards(WorkloadSettings):
    """All requests of the trace, the last one first."""

    fixed: ClassVar[bool] = True

    def check(self, seed):
        pass

    def draw(self, dataset, tokenizer, seed):
        raise NotImplementedError

    def recording(self, load):
        raise NotImplementedError

    def lengths(self, seed):
        return {}

    def traced(self, trace, seed):
        requests = tuple(Request(number, (), 2) for number in sorted(trace.numbers, reverse=True))
        origin = origin_in(trace) | {"dataset": "backwards"}
        return Workload(origin, (), (), requests)

    def schedule(self, requests, history=False):
        return FixedBatches(requests, 1)


@contextmanager
def prepare_twice(cfg, testbed, console):
    """Yield a replay that serves everything twice."""
    with replay.prepare(cfg, testbed, console) as setup:
        setup.workload = Workload(setup.workload.origin, (), (), setup.workload.measured * 2)
        yield setup
''',
}


def test_what_lies_outside_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    rows = [
        (request, phase, step, layer, 0, (request + layer) % 4, 1.0)
        for request in range(3)
        for step, phase in enumerate(("prefill", "decode"))
        for layer in range(2)
    ]
    names = ["request", "phase", "step", "layer", "rank", "expert", "weight"]
    pd.DataFrame(rows, columns=names).to_csv(tmp_path / "routing.csv", index=False)
    chosen = ("system=twice", "model=tiny", "weights=dummy", "workload=backwards", "testbed=a100")
    places = (f"routing={tmp_path / 'routing.csv'}", f"output={tmp_path}", "memory_budget=50%")
    config = ("--config-dir", str(tmp_path / "conf"))
    carried_out(*config, *chosen, *places)
    assert pd.read_parquet(tmp_path / "requests.parquet")["request"].tolist() == [2, 1, 0] * 2
    record = record_of(tmp_path)
    assert [record[k] for k in ("system", "model", "dataset")] == ["twice", "tiny", "backwards"]
