"""What a run prints may be anybody's text."""

from __future__ import annotations

import pytest

from experiments.run.console import Console, shown


def test_texts_are_shown_as_they_are_but_no_terminal_obeys_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console().announce(["[bold]a[/b] \\[red] \x1b[2J\x1b]0;title\x07 \x9b1m \r\u202eb\ud800"])
    printed = capsys.readouterr().out
    assert printed.startswith("[bold]a[/b] \\[red] \N{REPLACEMENT CHARACTER}[2J")
    assert not set("\x1b\x07\x9b\r\u202e\ud800") & set(printed)
    assert shown("plain").plain == "plain"
