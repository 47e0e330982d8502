"""Everything around the engine; docs/structures.md says what lies where."""

import sys
from pathlib import Path

from experiments.errors import say_starting

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"

if sys.argv[0] == "-m":  # This is `python -m experiments.<command>`, before its own imports.
    say_starting()
