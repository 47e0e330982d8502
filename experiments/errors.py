"""What ends a command: bad input, in one line and with exit code 2, or a signal."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from hydra.errors import OverrideParseException

BAD_INPUT = 2
"""The exit code of a command that was given what it cannot use."""
PLACE = "choose another folder, such as with output="
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: PLACE,
    errno.EACCES: PLACE,
    errno.EEXIST: PLACE,
    errno.ENOTDIR: PLACE,
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""By the number of what the file system refuses."""


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
        with file_errors():
            yield
    except (UserError, TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(exit_code(interrupt)) from None


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


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn what the file system refuses into UserError."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        cause = f"{error.filename or 'a file'}: {os.strerror(error.errno or 0).lower()}"
        raise UserError(f"{cause}; {remedy}") from error


def config_error(error: Exception) -> str:
    """Return in one line what Hydra or OmegaConf found wrong with a command, and what to do."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = shlex.quote(f'{key}="{value}"')
        return f"{error.override}: not key=value; a value with = or , is quoted: {quoted}"
    text = str(error).partition("Config search path")[0].replace("\n\t", " ")
    lines = (line.strip(" .") for line in text.splitlines())
    told = "; ".join(line for line in lines if line and not line.startswith("object_type"))
    launcher = re.search(r"hydra/launcher/(joblib|ray|submitit)", text)
    if launcher:
        extra = launcher[1].replace("submitit", "slurm")
        return f"{told}; install it: pip install -e '.[{extra}]'"
    return f"{told}; see --help"


def stop(number: int, _: object) -> None:
    """Handle a signal, such as SIGTERM, as an interrupt of the terminal."""
    raise KeyboardInterrupt(number)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code of a command that a signal stopped: 130 when interrupted."""
    return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
