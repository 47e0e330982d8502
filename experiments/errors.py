"""What bad input raises: one line with cause and remedy, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

BAD_INPUT = 2
"""The exit code of a command that was given what it cannot use."""
INTERRUPTED = 130


class UserError(Exception):
    """The run cannot start or go on because of what it was given."""


def say_starting() -> None:
    """Say on a terminal that there will be something to see: libraries take seconds to load."""
    if sys.stderr.isatty() and {"-h", "--help"}.isdisjoint(sys.argv):
        print("starting: libraries take some seconds to load", file=sys.stderr)


@contextmanager
def command() -> Iterator[None]:
    """Carry out a command: say bad input in one line and exit with 2, with 130 if interrupted."""
    from finemoe.trace import TraceError

    try:
        yield
    except (UserError, TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def words_given(
    doc: str | None, defaults: Mapping[str, str], words: Sequence[str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return a command's own ``key=value`` choices, and its other words; show `doc` for --help."""
    given = sys.argv[1:] if words is None else words
    if not {"-h", "--help"}.isdisjoint(given):
        print((doc or "").replace("``", ""))
        print(*(f"default: {name}={value}" for name, value in defaults.items()), sep="\n")
        raise SystemExit(0)
    own = [word for word in given if word.partition("=")[0] in defaults and "=" in word]
    chosen = {name: value for name, _, value in (word.partition("=") for word in own)}
    return {**defaults, **chosen}, [word for word in given if word not in own]
