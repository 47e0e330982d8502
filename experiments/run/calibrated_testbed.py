"""A machine's own emulated testbed in virtual time, with costs that were measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig
from pydantic import TypeAdapter

from experiments.errors import UserError
from experiments.run.testbeds import MB, Few, Megabytes
from finemoe.linear_costs import Line, LinearCosts
from finemoe.offload.replay import Extra, PredictionCosts, ThreadCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.options import Micros
from finemoe.testbed import SimulatedTestbed

Numbers = Mapping[str, Micros]


def calibrated(
    name: str,
    model: str,
    devices: Few,
    link: Numbers,
    chunk_mb: Megabytes,
    resume_us: Micros,
    compute_us: Mapping[str, Mapping[str, Any]],
    collect_us: Numbers,
    prediction_us: Mapping[str, Numbers],
) -> SimulatedTestbed:
    """Return the testbed that `python -m experiments.validate.calibrate` wrote.

    `link` holds `gb_s`, `time_scale`, `latency_us`, which is already stretched by the scale,
    `wake_us` and `lag_us`; `compute_us` a line each for start and finish and, for each system, for
    dense and expert, with `after_wait` and `while_copying` (`ThreadCosts`); the others a number, or
    one a call, for each system. Raises UserError for another model than the calibrated one, and
    for a system that was not measured.
    """
    try:
        start, finish = (Line(**_seconds(compute_us[part])) for part in ("start", "finish"))
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
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"testbed {name}: {cause}; run python -m experiments.validate.calibrate"
        ) from error

    def costs(asked: DictConfig, system: str, predicts: bool) -> LinearCosts:
        again = "calibrate again: python -m experiments.validate.calibrate"
        if asked.name != model:
            raise UserError(
                f"testbed {name} was calibrated with {model}, not {asked.name}; {again}"
            )
        if not all(system in known for known in (dense, expert, collect_us)):
            raise UserError(f"testbed {name} knows no costs of system={system}; {again}")
        calls: Any = _seconds(prediction_us.get(system, {}))
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


def _disturbed(micros: Numbers) -> tuple[Line, Extra]:
    """Return a line, and what comes on top of it when the model's thread is disturbed."""
    seconds = _seconds(micros)
    names = [one.name for one in fields(Extra)]
    extra = Extra(**{name: seconds.pop(name, 0.0) for name in names})
    return Line(**seconds), extra


def _seconds(micros: Numbers) -> dict[str, float]:
    numbers = TypeAdapter(Numbers).validate_python(micros)
    return {name: value * 1e-6 for name, value in numbers.items()}
