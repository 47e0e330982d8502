"""From a memory budget to slots: how many experts fit, and on which device."""

import re

from finemoe.offload.policy import ModelShape

GB = 1_000_000_000
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class BudgetError(ValueError):
    """The budget cannot hold what one layer needs."""


def parse_budget(budget: float | str, full_expert_bytes: int, shape: ModelShape) -> int:
    """Return bytes from GB, a size with a unit, or a share (``25%``); else raise BudgetError."""
    units = {"": GB, **UNITS, "%": full_expert_bytes * shape.layers * shape.experts / 100}
    match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?) ?(%|[kmg]i?b|)", str(budget).strip().lower())
    try:
        if match is None:
            raise ValueError
        return round(float(match[1]) * units[match[2]])
    except (ValueError, OverflowError):
        raise BudgetError(
            f"memory_budget={budget} is neither a size nor a share: write 6, 6GB or 25%"
        ) from None


def plan_slots(
    budget_bytes: int, full_expert_bytes: int, shape: ModelShape, devices: int
) -> tuple[int, ...]:
    """Return each device's slots, spread evenly; BudgetError below K experts or one a device."""
    total = budget_bytes // full_expert_bytes
    least = max(shape.top_k, devices)
    if total < least:
        minimum = -(-least * full_expert_bytes * 1000 // GB) / 1000
        raise BudgetError(
            f"a memory budget of {budget_bytes / GB:.3f} GB holds {total} experts of "
            f"{full_expert_bytes / GB:.3f} GB; give at least {minimum:.3f} GB ({least} experts)"
        )
    return spread(shape, devices, total)


def spread(shape: ModelShape, devices: int, slots: int | None = None) -> tuple[int, ...]:
    """Return each device's share of `slots`, no more than it has experts; None: one for each."""
    total = shape.size if slots is None else slots
    return tuple(
        min(total // devices + (device < total % devices), len(range(device, shape.size, devices)))
        for device in range(devices)
    )
