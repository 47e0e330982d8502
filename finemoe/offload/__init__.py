"""The engine that every system runs on; it knows no system by name."""

from pathlib import Path

from finemoe.offload.compiled import require_fresh

require_fresh(Path(__file__).parent)
