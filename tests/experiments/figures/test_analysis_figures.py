"""Analyses and pictures of a toy trace (`test_routing` has it) and of published shapes."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra.utils import get_method
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.figures import analyses, figure3
from finemoe.trace import CONTENTS, TracedRequest, TraceHeader, trace_writer
from tests.command import config
from tests.experiments.figures.test_routing import (
    EXPERTS,
    LN2,
    REQUESTS,
    SHAPE,
    THREE_TO_ONE,
    request,
)

OF_TRACES = ("figure3a", "figure3b", "figure3c", "figure4", "figure8", "figure9", "figure16a")
OF_SHAPES = ("table1", "figure18")


def leave_trace(path: Path, *requests: TracedRequest) -> Path:
    header = TraceHeader(SHAPE, "float32", CONTENTS, {"weights": "scale"})
    with trace_writer(path, header) as write:
        for one in requests:
            write(one)
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_trace(tmp_path_factory.mktemp("toy") / "toy.parquet", *REQUESTS)


def analysed(name: str, traces: analyses.Traces, folder: Path, *overrides: str) -> DictConfig:
    cfg = config("config", f"experiment={name}", "workload.history_share=0.5", *overrides)
    get_method(cfg.experiment.analysis)(cfg, traces, folder)
    return cfg


def table_of(name: str, toy: Path, folder: Path, *overrides: str) -> pd.DataFrame:
    """Return what an analysis leaves; the first toy request is history, the second measured."""
    subjects = "experiment.models=[mixtral]", "experiment.datasets=[docs]"
    analysed(name, {("mixtral", "docs"): toy}, folder, *subjects, *overrides)
    return analyses.read_analysis(folder)[1]


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", [*OF_TRACES, *OF_SHAPES])
def test_every_figure_is_drawn_from_its_analysis(name: str, toy: Path, tmp_path: Path) -> None:
    everywhere = {(m, d): toy for m in ("mixtral", "qwen", "phi") for d in ("docs", "code")}
    cfg = analysed(name, everywhere, tmp_path / "analysis")
    record = json.loads((tmp_path / "analysis" / "record.json").read_text())
    assert record["provenance"]["versions"]["numpy"] == np.__version__
    assert {one["measured_requests"] for one in record["subjects"]} <= {1}
    get_method(cfg.experiment.draws)(tmp_path / "analysis", tmp_path)
    caption = (tmp_path / f"{cfg.experiment.id}.txt").read_text()
    assert record["mode"] in caption
    assert ("weights: scale" in caption) == (name in OF_TRACES)


def test_activation_shares_by_hand(toy: Path, tmp_path: Path) -> None:
    heat = table_of("figure3a", toy, tmp_path)
    layers = heat.set_index(["layer", "expert"]).unstack("layer")
    np.testing.assert_allclose(layers["coarse"].T, [[0.75, 0.25, 0], [0, 0.25, 0.75]])
    np.testing.assert_allclose(layers["fine"].T, [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    np.testing.assert_allclose(layers["fine_counts"].T, [[0, 1, 0], [0, 0, 1]])


def test_entropies_by_hand(toy: Path, tmp_path: Path) -> None:
    # Layer by layer, request 0 counts 3:1 and 3:1, request 1 counts 2:2 and one expert only.
    table = table_of("figure3b", toy, tmp_path)
    nats = table.set_index(["measure", "granularity"])["nats"]
    assert nats["counts", "coarse"] == pytest.approx((THREE_TO_ONE + LN2 / 2) / 2)
    assert nats["counts", "fine"] == pytest.approx(0)
    assert nats["gate", "fine"] == pytest.approx(1.5 * LN2)
    # Request 0, layer 0: three tokens prefer expert 0, one expert 1: 7:5:4 sixteenths.
    tokens = np.array([[7, 5, 4], [4, 5, 7], [4, 6, 6], [8, 4, 4]]) / 16
    whole = -(tokens * np.log(tokens)).sum(axis=1).mean()
    assert nats["gate", "coarse"] == pytest.approx(whole, rel=1e-6)
    assert table["uniform"].to_numpy() == pytest.approx(math.log(EXPERTS))


def test_entropy_grows_by_hand(toy: Path, tmp_path: Path) -> None:
    # Only layer 0 of request 0 changes its expert in the second decoded token.
    table = table_of("figure3c", toy, tmp_path)
    assert table["nats"].tolist() == pytest.approx([0, LN2 / 4])
    assert table["requests"].tolist() == [2, 2]
    shorter = table_of("figure3c", toy, tmp_path, "experiment.iterations=1")
    assert shorter["iterations"].tolist() == [1]


def test_scores_by_capacity_by_hand(toy: Path, tmp_path: Path) -> None:
    table = table_of("figure16a", toy, tmp_path, "experiment.capacities=[1,10]")
    assert table["stored"].tolist() == [1, 1, 3, 3]
    # What the measured decode in layer 0, where they are searched for, the history did last.
    assert table["score"].tolist() == pytest.approx([1, 1, 1, 1])


def test_hit_rates_by_distance_by_hand(tmp_path: Path) -> None:
    # The past request's counts say expert 2 of layer 1, twice. Its maps say 1 after a layer 0 as in
    # its prefill, which is the first of equals, and 2 after one as in its second decoded token.
    measured = request(1, [[2, 2], [0, 0]], [[0], [1]], [[1], [2]])
    trace = leave_trace(tmp_path / "trace.parquet", REQUESTS[0], measured)
    table = table_of("figure4", trace, tmp_path)
    assert table["distance"].tolist() == [1, 1]
    assert table.set_index("granularity")["hit_rate"].to_dict() == {"coarse": 0.5, "fine": 1}
    assert table["chance"].tolist() == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("figure9", ["experiment.datasets=[docs]"], "no routing trace of qwen on docs"),
        (
            "figure8",
            ["experiment.models=[mixtral]", "experiment.datasets=[docs]", "experiment.point=last"],
            "choose one of prefill",
        ),
        ("figure3a", ["workload.history_share=0.01"], "leaves no history"),
        ("table1", ["experiment.models=[mixtrel]"], "choose some of mixtral"),
    ],
)
def test_refusals(name: str, overrides: list[str], message: str, toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        analysed(name, {("mixtral", "docs"): toy}, tmp_path / "a", *overrides)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="is no complete analysis"):
        figure3.draw_heatmaps(tmp_path / "a", tmp_path)
