"""Fuzzing: a few cases of most tests in every run of the tests, thousands with `make fuzz`.

A failing case is shrunk and printed, and tried first in the next run; `make fuzz SEED=n` repeats a
whole run.
"""

import os

from hypothesis import HealthCheck, settings


def fuzzed(examples: int) -> settings:
    """Return settings for `examples` cases, FUZZ times as many if that is in the environment.

    Without it the cases are the same every time, so that nobody's change fails for another's fault.
    """
    return settings(
        derandomize="FUZZ" not in os.environ,
        max_examples=examples * int(os.environ.get("FUZZ", "1")),
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
