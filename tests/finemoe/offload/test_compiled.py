from __future__ import annotations

import os
from pathlib import Path

import pytest

from finemoe.offload.compiled import is_compiled, require_fresh


def build(folder: Path, edited: str, compiled_at: float) -> None:
    for name, time in (
        ("cache.py", 90.0),
        ("cache.pxd", 90.0),
        (edited, 100.0),
        ("cache.cpython-311.so", compiled_at),
    ):
        (folder / name).touch()
        os.utime(folder / name, (time, time))


@pytest.mark.parametrize("edited", ["cache.py", "cache.pxd"])
def test_a_source_edited_after_it_was_compiled_is_refused(tmp_path: Path, edited: str) -> None:
    build(tmp_path, edited, compiled_at=101.0)
    require_fresh(tmp_path)
    build(tmp_path, edited, compiled_at=99.0)
    with pytest.raises(ImportError, match=f"{edited} is newer .* make compiled"):
        require_fresh(tmp_path)


def test_nothing_compiled_is_nothing_stale(tmp_path: Path) -> None:
    (tmp_path / "cache.py").touch()
    require_fresh(tmp_path)


def test_compiled_modules_are_told_by_their_file() -> None:
    assert is_compiled("/x/replay.cpython-311-x86_64-linux-gnu.so")
    assert not is_compiled("/x/replay.py")
    assert not is_compiled(None)
