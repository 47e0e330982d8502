"""From times taken live to the costs of a testbed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import UserError
from experiments.run.console import Console
from experiments.validate.calibrate import Calibration, fit
from experiments.validate.probe import Sample
from tests.command import config

micros = st.floats(1.0, 1000.0)


@given(base=micros, per_token=micros, per_context=st.floats(0.1, 10.0))
def test_a_line_is_found_again(base: float, per_token: float, per_context: float) -> None:
    places = [(1, 10), (1, 100), (8, 8), (40, 40), (128, 128)]
    samples = [Sample(t, c, (base + per_token * t + per_context * c) * 1e-6) for t, c in places * 2]
    line = fit(samples, ("per_context",))
    for tokens, context in places:
        seconds = line["base"] + line["per_token"] * tokens + line["per_context"] * context
        assert seconds == pytest.approx(base + per_token * tokens + per_context * context, rel=1e-3)


def test_costs_are_never_negative_and_leave_out_what_is_not_asked_for() -> None:
    line = fit([Sample(1, 5, 10e-6), Sample(2, 9, 8e-6), Sample(3, 1, 6e-6)], ())
    assert line.keys() == {"base", "per_token"}
    assert line["per_token"] == 0
    assert 6 < line["base"] < 10


def test_waits_and_copies_are_told_apart() -> None:
    samples = [
        Sample(tokens, 0, (100 + 2 * tokens + 50 * waited + 30 * copying) * 1e-6, waited, copying)
        for tokens in (1, 9)
        for waited, copying in ((False, False), (True, False), (True, True))
    ]
    assert fit(samples, ("after_wait", "while_copying")) == pytest.approx(
        {"base": 100, "per_token": 2, "after_wait": 50, "while_copying": 30}
    )


def test_a_thread_that_lost_its_core_is_left_out() -> None:
    line = fit([Sample(1, 0, seconds) for seconds in (1e-4, 1e-4, 2e-4, 3e-3)], ())
    assert line["base"] + line["per_token"] == pytest.approx(400 / 3)


def test_only_one_device_is_calibrated() -> None:
    with pytest.raises(UserError, match="one device"):
        Calibration(config("calibrate", "testbed.devices=2"), Console())
