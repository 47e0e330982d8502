"""A machine's own emulated testbed in virtual time, with costs that were measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.testbeds import emulated
from finemoe.linear_costs import Line, LinearCosts
from finemoe.offload.replay import PredictionCosts
from finemoe.offload.virtual_links import LinkRate
from finemoe.testbed import SimulatedTestbed

Numbers = Mapping[str, float]


def calibrated(
    name: str,
    model: str,
    devices: int,
    link: Numbers,
    chunk_mb: float,
    compute_us: Mapping[str, Numbers],
    collect_us: Numbers,
    prediction_us: Mapping[str, Numbers],
) -> SimulatedTestbed:
    """Return the testbed that `python -m experiments.calibrate` wrote.

    `link` holds `gb_s`, `time_scale`, and `latency_us`, which is already stretched by the scale;
    `compute_us` a line for each of start, dense, finish and expert; the others a number, or one a
    call, for each system. Raises UserError for another model than the calibrated one, and for a
    system that was not measured.
    """
    as_emulated = emulated(devices, link["gb_s"], 0.0, link["time_scale"], chunk_mb, None)
    try:
        lines = {part: Line(**_seconds(compute_us[part])) for part in compute_us}
        start, dense, finish, expert = (lines[k] for k in ("start", "dense", "finish", "expert"))
        rate = LinkRate(link["gb_s"] * 1e9 / link["time_scale"], link["latency_us"] * 1e-6)
    except (KeyError, TypeError) as error:
        raise UserError(f"testbed {name}: {error}; run python -m experiments.calibrate") from error

    def costs(asked: DictConfig, system: str) -> LinearCosts:
        again = "calibrate again: python -m experiments.calibrate"
        if asked.name != model:
            raise UserError(
                f"testbed {name} was calibrated with {model}, not {asked.name}; {again}"
            )
        if system not in collect_us:
            raise UserError(f"testbed {name} knows no costs of system={system}; {again}")
        calls: Any = _seconds(prediction_us.get(system, {}))
        return LinearCosts(
            start,
            dense,
            finish,
            expert,
            collect=collect_us[system] * 1e-6,
            prediction=PredictionCosts(**calls),
        )

    return SimulatedTestbed(name, devices, as_emulated.chunk_bytes, rate, costs)


def _seconds(micros: Numbers) -> dict[str, float]:
    return {name: value * 1e-6 for name, value in micros.items()}
