"""What the documentation tells people to write and run works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.command import ROOT, SMALL

PAGE = (ROOT / "docs" / "adding-a-system.md").read_text()


def test_the_example_system_runs_from_the_page(tmp_path: Path) -> None:
    blocks = re.findall(r"`my_systems/(\S+)`:\n\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["popular.py", "conf/system/popular.yaml"]
    for name, text in blocks:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "run.py", "--config-dir", str(tmp_path / "conf"), "system=popular"]
    done = subprocess.run(
        [*command, *SMALL, "memory_budget=24", f"output={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["system"] == "popular"
    assert record["summary"]["lossless"] is True
    assert record["summary"]["bytes_prefetched"] > 0


def test_every_system_is_listed_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "conf" / "system").glob("*.yaml"):
        assert f"`{path.stem}`" in readme, path.stem
