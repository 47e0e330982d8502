import os
from pathlib import Path

import pytest

from finemoe.offload import require_fresh


def test_a_source_edited_after_it_was_compiled_is_refused(tmp_path: Path) -> None:
    source, binary = tmp_path / "cache.py", tmp_path / "cache.cpython-311.so"
    source.touch()
    require_fresh(tmp_path)
    binary.touch()
    os.utime(source, (100.0, 100.0))
    os.utime(binary, (101.0, 101.0))
    require_fresh(tmp_path)
    os.utime(binary, (99.0, 99.0))
    with pytest.raises(ImportError, match=r"cache.py is newer .* make compiled"):
        require_fresh(tmp_path)
