"""What awaited prefetches are for, in the real engine: nobody misses what was asked for."""

from __future__ import annotations

import pytest

from finemoe.assemble import offloading_runtime
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome, Policy
from tests.engine import configured, emulated, offloaded, prepared, requests, serve


@pytest.fixture(scope="module")
def model() -> OffloadedModel:
    return offloaded()


def outcomes(model: OffloadedModel, policy: Policy, slots: int) -> list[LayerOutcome]:
    """Serve one request of one prompt token and return how its experts were found."""
    found: list[LayerOutcome] = []
    stored = model.store.layout.nbytes
    with offloading_runtime(model, policy, emulated(1), (slots,), stored) as runtime:
        runtime.listeners.append(found.append)
        serve(runtime, requests(1, 1))
    return found


def test_deepspeed_misses_nothing_and_waits_if_a_layer_fits(model: OffloadedModel) -> None:
    fits = outcomes(model, configured("deepspeed", model.shape), slots=model.shape.experts)
    assert all(outcome.hits == outcome.activated for outcome in fits)
    short = outcomes(model, configured("deepspeed", model.shape), slots=model.shape.top_k)
    assert any(outcome.late for outcome in short)
    assert not any(outcome.misses for outcome in short)


def test_awaited_guesses_are_there_or_were_not_asked_for(model: OffloadedModel) -> None:
    policy = prepared(configured("mixtral_offload", model.shape), model, history=False)
    found = outcomes(model, policy, slots=8)
    assert all(not outcome.late for outcome in found)
    assert sum(len(outcome.hits) for outcome in found) > 0
