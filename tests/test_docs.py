"""What the documentation tells people to write and run works as it stands there."""

import re
from pathlib import Path

import pytest

from tests.command import ROOT, SMALL, carried_out, record_of

PAGE = (ROOT / "docs" / "adding-a-system.md").read_text()


def test_the_example_system_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"`my_systems/(\S+)`:\n\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["popular.py", "conf/system/popular.yaml"]
    for name, text in blocks:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    asked = ["--config-dir", str(tmp_path / "conf"), "system=popular", "memory_budget=24"]
    carried_out(*asked, *SMALL, f"output={tmp_path / 'run'}")
    record = record_of(tmp_path / "run")
    assert record["system"] == "popular"
    assert record["summary"]["lossless"] is True
    assert record["summary"]["bytes_prefetched"] > 0
