"""A machine's own emulated testbed in virtual time, with costs that were measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.testbeds import MB, Few, Megabytes
from finemoe.costs import Line, LinearCosts
from finemoe.offload.replay import Extra, PredictionCosts, ThreadCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.options import Micros
from finemoe.testbed import SimulatedTestbed

AGAIN = "calibrate again: python -m experiments.validate.calibrate"
EXTRA = [field.name for field in fields(Extra)]

Numbers = Mapping[str, Micros]
LinkNumber = Literal["gb_s", "time_scale", "latency_us", "wake_us", "lag_us"]
Call = Literal["embeddings", "gate", "update"]


def calibrated(
    name: str,
    model: str,
    devices: Few,
    link: Mapping[LinkNumber, Micros],
    chunk_mb: Megabytes,
    resume_us: Micros,
    compute_us: Mapping[str, Mapping[str, Micros | Numbers]],
    collect_us: Numbers,
    prediction_us: Mapping[str, Mapping[Call, Micros]],
) -> SimulatedTestbed:
    """Return the testbed that `python -m experiments.validate.calibrate` wrote.

    `latency_us` of `link` is already stretched by its `time_scale`. `compute_us` holds a line each
    for start and finish and, for each system, for dense and expert, with `after_wait` and
    `while_copying` (`ThreadCosts`); the others a number, or one a call, for each system. Raises
    UserError for another model than the calibrated one, and for a system that was not measured.
    """
    try:
        (start, _), (finish, _) = (_disturbed(compute_us[part]) for part in ("start", "finish"))
        dense, expert = (
            {system: _disturbed(line) for system, line in compute_us[part].items()}
            for part in ("dense", "expert")
        )
        rate = LinkRate(
            link["gb_s"] * 1e9 / link["time_scale"],
            link["latency_us"] * 1e-6,
            lag=link["lag_us"] * 1e-6,
            wake=link["wake_us"] * 1e-6,
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"testbed {name}: {error}; {AGAIN}") from error

    def costs(asked: DictConfig, system: str, predicts: bool) -> LinearCosts:
        if asked.name != model:
            raise UserError(
                f"testbed {name} was calibrated with {model}, not {asked.name}; {AGAIN}"
            )
        if not all(system in known for known in (dense, expert, collect_us)):
            raise UserError(f"testbed {name} knows no costs of system={system}; {AGAIN}")
        calls = {call: us * 1e-6 for call, us in prediction_us.get(system, {}).items()}
        (dense_line, dense_extra), (expert_line, expert_extra) = dense[system], expert[system]
        return LinearCosts(
            start,
            dense_line,
            finish,
            expert_line,
            collect=collect_us[system] * 1e-6,
            prediction=PredictionCosts(**calls),
            prediction_source=f"{system} on {model}, on this machine",
            thread=ThreadCosts(resume_us * 1e-6, dense_extra, expert_extra),
        )

    scale = link["time_scale"]
    return SimulatedTestbed(name, devices, round(chunk_mb * MB), rate, costs, time_scale=scale)


def _disturbed(micros: Any) -> tuple[Line, Extra]:
    """Return a line, and what comes on top of it when the model's thread is disturbed."""
    seconds = {name: us * 1e-6 for name, us in micros.items()}
    extra = Extra(**{name: seconds.pop(name, 0.0) for name in EXTRA})
    return Line(**seconds), extra
