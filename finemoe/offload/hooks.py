"""Calls of a policy's hooks: what they raise, and answers of a wrong type, name system and hook."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy import dtype, float64, ndarray

Hook = Callable[..., Any]
"""A bound method of a policy."""

FLOAT64 = dtype(float64)


class PolicyError(ValueError):
    """A hook of a policy raised, or answered what the engine cannot use."""


def refused(hook: Hook, layer: int, what: str) -> PolicyError:
    """Return the error that names a hook's system and, from 0 on, the layer it was asked about."""
    system = type(getattr(hook, "__self__", hook)).__name__
    where = f", layer {layer}" if layer >= 0 else ""
    return PolicyError(f"{system}.{hook.__name__}{where}: {' '.join(what.split())}")


def told(hook: Hook, layer: int, arguments: tuple[Any, ...]) -> Any:
    """Call a hook; PolicyError, with the line of the hook's own file, if it raises."""
    try:
        return hook(*arguments)
    except Exception as error:
        raise raised(hook, layer, error) from error


def raised(hook: Hook, layer: int, error: Exception) -> PolicyError:
    """Return the error for what a hook raised."""
    source = getattr(getattr(hook, "__code__", None), "co_filename", "")
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((one for one in reversed(frames) if one.filename == source), frames[-1])
    line = f"{Path(frame.filename).name}:{frame.lineno}"
    return refused(hook, layer, f"raised {type(error).__name__}: {error} ({line})")


def table_fault(values: Any, due: tuple[int, int]) -> str:
    """Return what is wrong with the type of keys or priorities of shape `due`; "" if nothing is."""
    if not isinstance(values, ndarray):
        return f"{type(values).__name__}; give an array of float64, shape {due}"
    if values.dtype != FLOAT64 or values.shape != due:
        return f"an array of {values.dtype}, shape {values.shape}; give float64, shape {due}"
    return ""
