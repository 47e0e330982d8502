"""Everything around the engine; docs/structures.md says what lies where."""

import os
import platform
import sys
from pathlib import Path

from experiments.errors import say_starting

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"

if platform.machine() == "x86_64":
    # Wider vectors add in another order: last bits of sums, then tokens that nearly tie, and then
    # routing would differ from CPU to CPU.
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")

if sys.argv[0] == "-m":  # This is `python -m experiments.<command>`, before its own imports.
    say_starting()
