"""Files appear whole or not at all, and what dead processes left goes."""

import signal
from pathlib import Path

import pytest

from finemoe.files import atomic_write
from tests.command import python

WRITE = """
import os, signal, sys
from pathlib import Path
from finemoe.files import atomic_write
with atomic_write(Path(sys.argv[1])) as partial:
    partial.write_text("theirs")
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def elsewhere(path: Path, number: int) -> int:
    """Write the file in another process that sends itself a signal, or none if 0."""
    return python("-c", WRITE, str(path), str(number)).returncode


def test_two_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as partial:
        partial.write_text("ours")
        assert elsewhere(path, 0) == 0
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_no_other(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "ours") as ours:
        ours.write_text("half")
        assert elsewhere(tmp_path / "theirs", signal.SIGKILL) == -signal.SIGKILL
        (left,) = set(tmp_path.iterdir()) - {ours}
        with atomic_write(tmp_path / "next") as partial:
            partial.touch()
            assert not left.exists()
            assert ours.exists()


def test_an_error_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "folder") as partial:  # noqa: PT011
        partial.touch()
    assert raised.value.filename == str(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
