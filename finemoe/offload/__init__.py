"""The engine that every system runs on; it knows no system by name."""

from pathlib import Path


def require_fresh(folder: Path) -> None:
    """Raise ImportError if a source was edited after it was compiled: the edit would not count."""
    for binary in folder.glob("*.so"):
        source = folder / f"{binary.name.partition('.')[0]}.py"
        if source.exists() and source.stat().st_mtime > binary.stat().st_mtime:
            raise ImportError(
                f"{source} is newer than its compiled form; run make compiled again, or "
                f"rm {folder}/*.so to interpret it"
            )


require_fresh(Path(__file__).parent)
