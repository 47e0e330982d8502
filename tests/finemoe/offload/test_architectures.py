"""Every mixture-of-experts architecture of transformers is served bit for bit, or listed."""

import re
from functools import partial
from typing import Any

import pytest
import torch

from experiments.run.live import PlainRuntime
from finemoe.offload.gates import is_plain
from finemoe.offload.model import OffloadedModel
from tests.architectures import kinds, member
from tests.command import ROOT
from tests.engine import CPU, configured, logits_of, offloading, prepared, requests

NOT_SERVED = {
    "deepseek_v4": "ValueError: 0 gates for 3 MoE layers",
    "diffusion_gemma": "ValueError: DiffusionGemmaForBlockDiffusion has experts in model.encoder",
    "ernie4_5_vl_moe": "ValueError: 2 gates for 4 MoE layers",
    "zaya": "ValueError: gates choose among 9, and layers have 8 experts",
}
"""Why, as the outcome begins."""


def watch(model: OffloadedModel) -> list[str]:
    """Compare what gates are said to choose by with what they choose; return where it differs."""
    wrong: list[str] = []
    ranked: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        ranked.append(output[model.logits_index].reshape(-1, model.shape.experts))

    def compare(layer: int, _module: Any, inputs: Any) -> None:
        logits, chosen = ranked.pop(), inputs[1]
        best = logits.topk(model.shape.top_k).values[:, -1:]
        if (logits.gather(1, chosen) < best).any():
            wrong.append(f"layer {layer}")

    for layer, (gate, experts) in enumerate(zip(model.gates, model.experts, strict=True)):
        gate.register_forward_hook(note)
        experts.register_forward_pre_hook(partial(compare, layer))
    return wrong


def outcome(kind: str) -> str:
    """Serve a kind under a tight budget; return "served", or what is in the way."""
    load = requests(2, 9)
    try:
        expected = logits_of(PlainRuntime(member(kind)), load)
        model = OffloadedModel.from_model(member(kind), CPU)
        policy = prepared(configured("finemoe", model.shape), model)
        wrong, slots = watch(model), (max(model.shape.top_k, model.shape.size // 3),)
        with offloading(model, policy, slots) as runtime:
            logits = logits_of(runtime, load)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if len(logits) != len(expected) or not all(map(torch.equal, logits, expected)):
        return "other logits than eager experts"
    if wrong:
        return f"chooses otherwise in {wrong[0]}"
    return "a softmax of their logits" if all(map(is_plain, model.gates)) else "other scores"


PAGE = (ROOT / "docs" / "adding-a-model.md").read_text()
DOCUMENTED = {
    kind: what
    for what, kinds in re.findall(r"^\| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    for kind in kinds.split(", ")
}
"""What the tables of the page say of each kind."""


@pytest.mark.parametrize("kind", kinds())
def test_an_architecture_is_served_bit_for_bit_or_listed(kind: str) -> None:
    named = kind.removesuffix("_text")
    expected = NOT_SERVED.get(kind) or DOCUMENTED[named].partition(":")[0]
    assert outcome(kind).startswith(expected)


def test_only_architectures_that_exist_are_listed() -> None:
    assert {*NOT_SERVED} <= {*kinds()}
    assert len(kinds()) > 50


def test_shares_that_a_gate_tells_are_not_taken_for_logits() -> None:
    gate: Any = OffloadedModel.from_model(member("gemma4_text"), CPU).gates[0]
    hidden = torch.randn(5, 32, dtype=torch.bfloat16)
    shares = type(gate).forward(gate, hidden)[0]
    assert torch.allclose(gate(hidden)[0].softmax(-1), shares, atol=1e-4)
