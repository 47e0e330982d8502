"""Everything around the engine: harness, datasets, metrics, run records, scale models."""

import sys

from experiments.errors import say_starting

if sys.argv[0] == "-m":  # This is `python -m experiments.<command>`, before its own imports.
    say_starting()
