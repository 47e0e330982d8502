"""What a run prints, for latencies of milliseconds and of hours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.run.console import Console


def latency(seconds: float) -> dict[str, Any]:
    return {"mean": seconds, "ci95": [seconds, seconds], "p50": seconds, "p95": seconds,
            "p99": seconds}  # fmt: skip


def record(e2el: float) -> dict[str, Any]:
    counts = {"expert_hit_rate": 0.5, "hits": 1, "late": 0, "misses": 1}
    traffic = dict.fromkeys(("bytes_prefetched", "bytes_on_demand", "bytes_wasted"), 0)
    summary = {
        **{name: latency(0.0123) for name in ("ttft_s", "tpot_s", "itl_s")},
        "e2el_s": latency(e2el), **counts, "phases": {"decode": counts}, "bound": None,
        **traffic, "peak_slot_bytes": 0, "slot_budget_bytes": 0, "lossless": None,
    }  # fmt: skip
    return {"system": "finemoe", "model": "mixtral", "memory_budget_gb": 6.0, "mode": "simulated",
            "summary": summary}  # fmt: skip


def test_names_and_texts_are_shown_as_they_are_but_no_terminal_obeys_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = {**record(1.5), "model": "[bold]a[/b]\x1b[2J", "system": "\\[red]"}
    Console().results(odd, Path("[/]\r.json"), ("\x1b]0;title\x07 \x9b1m [/x]", "\u202eb\ud800"))
    printed = capsys.readouterr().out
    assert "\\[red] on [bold]a[/b]\N{REPLACEMENT CHARACTER}[2J, 6.0 GB" in printed
    assert "[/x]" in printed
    assert "run record: [/]" in printed
    assert not set("\x1b\x07\x9b\r\u202e\ud800") & set(printed)
