"""Whether the engine runs compiled (``make compiled``), and whether from today's sources."""

from __future__ import annotations

from pathlib import Path

SUFFIX = ".so"


def require_fresh(folder: Path) -> None:
    """Raise ImportError if a source was edited after it was compiled: the edit would not count."""
    for binary in folder.glob(f"*{SUFFIX}"):
        for suffix in (".py", ".pxd"):
            source = folder / f"{binary.name.partition('.')[0]}{suffix}"
            if source.exists() and source.stat().st_mtime > binary.stat().st_mtime:
                raise ImportError(
                    f"{source} is newer than its compiled form; run make compiled again, or "
                    f"rm {folder}/*{SUFFIX} to interpret it"
                )


def is_compiled(module_file: str | None) -> bool:
    """Tell whether a module, by its `__file__`, is a compiled one."""
    return bool(module_file) and Path(str(module_file)).suffix == SUFFIX
