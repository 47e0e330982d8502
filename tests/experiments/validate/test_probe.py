"""Times taken live, by hand, and the parts that they fall into."""

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.validate.probe import Probe, Sample, Span, compute_samples, wake_and_resume
from finemoe.offload.policy import Iteration, LayerOutcome
from finemoe.offload.routed import RoutedStep
from finemoe.trace import TracedRequest

PREFILL = Iteration(0, "prefill", (7,), (3,))
DECODES = [Iteration(number, "decode", (7,), (1,)) for number in (1, 2)]


def step(tokens: int, counts: list[list[int]]) -> RoutedStep:
    return RoutedStep(tokens, np.array(counts), None, None, None)


def hit(iteration: Iteration, layer: int, *experts: int) -> LayerOutcome:
    return LayerOutcome(iteration, layer, experts, (), ())


def miss(iteration: Iteration, layer: int, *experts: int) -> LayerOutcome:
    return LayerOutcome(iteration, layer, (), (), experts)


def expert(name: str, start: float, end: float) -> Span:
    return Span("device 0", start, end, f"expert {name}")


def test_an_iteration_is_split_at_its_gates_and_experts() -> None:
    # Two layers of two experts; the prefill begins at 10, its gates ask at 14 and 20.
    traced = {7: TracedRequest(7, (1, 2, 3), (4, 5), (step(3, [[2, 1], [0, 3]]),))}
    probe = Probe(
        begins=[(PREFILL, 10.0), (DECODES[0], 26.0)],
        gates=[(hit(PREFILL, 0, 0, 1), 14.0), (hit(PREFILL, 1, 1), 20.0)],
        spans=[
            expert("0.0", 14.5, 16.0),
            Span("search", 15.0, 19.0, own=False),
            expert("0.1", 16.0, 17.0),
            expert("1.1", 20.0, 25.0),
        ],
    )
    assert compute_samples(probe, traced, layers=2) == {
        "expert": [Sample(2, 0, 2.0), Sample(1, 0, 1.0), Sample(3, 0, 5.0)],
        "dense": [Sample(3, 3, 3.0)],
        "start": [Sample(3, 3, 1.0)],
        "finish": [Sample(3, 3, 1.0)],
    }


def test_waits_and_calls_count_for_no_part_but_leave_their_mark() -> None:
    traced = {7: TracedRequest(7, (1, 2, 3), (4, 5), (step(3, [[2, 1], [0, 3]]),))}
    probe = Probe(
        begins=[(PREFILL, 10.0), (DECODES[0], 60.0)],
        gates=[(miss(PREFILL, 0, 0, 1), 14.0), (miss(PREFILL, 1, 1), 42.0)],
        spans=[
            Span("context_collection", 14.0, 15.0),
            Span("on_demand_wait", 15.0, 22.0),
            # Loads came in another order than they were asked for; the second runs beside the
            # link's next chunks, of which the last ends within the dense part.
            expert("0.1", 22.5, 24.0),
            Span("link 0", 14.0, 22.0, own=False),
            Span("link 0", 22.0, 32.0, own=False),
            Span("on_demand_wait", 24.0, 31.0),
            expert("0.0", 31.0, 34.0),
            Span("prefetch_wait", 34.0, 38.0),
            Span("on_demand_wait", 43.0, 43.00001),
            expert("1.1", 43.5, 45.0),
        ],
    )
    found = compute_samples(probe, traced, layers=2)
    assert found["expert"] == [
        Sample(1, 0, 2.0, waited=False, copying=True),
        Sample(2, 0, 3.0, waited=True, copying=False),
        Sample(3, 0, pytest.approx(2.0, abs=1e-4), waited=True, copying=False),  # type: ignore[arg-type]
    ]
    assert found["dense"] == [Sample(3, 3, 4.0, waited=True, copying=False)]


def test_links_wake_and_models_resume() -> None:
    half = LayerOutcome(DECODES[0], 1, (0,), (), (1,))
    spans = [
        Span("link 0", 1.5, 3.0, own=False),
        Span("link 0", 3.0, 8.0, own=False),
        # Due at 4.5 and 7.5.
        Span("on_demand_wait", 1.0, 4.75),
        Span("on_demand_wait", 6.0, 8.0),
        Span("link 0", 11.0, 14.0, own=False),
        Span("on_demand_wait", 10.0, 14.0),
    ]
    probe = Probe(gates=[(miss(DECODES[0], 0, 0, 1), 1.0), (half, 10.0)], spans=spans)
    assert wake_and_resume(probe, load_seconds=3.0) == pytest.approx((0.5, (0.25 + 0.5) / 2))
    with pytest.raises(UserError, match="lower memory_budgets"):
        wake_and_resume(Probe(gates=[(half, 0.0)], spans=spans), 3.0)
