"""What ends a command: bad input, in one line and with exit code 2, or a signal."""

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finemoe.files import cause_of

BAD_INPUT = 2  # the exit code of a command that was given what it cannot use
REFUSED = (errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
REMEDIES = {  # by what the file system says
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys(REFUSED, "choose another folder, such as with output="),
}


class UserError(Exception):
    """The run cannot start or go on because of what it was given."""


def say_starting() -> None:
    """Say on a terminal that there will be something to see: libraries take seconds to load."""
    if sys.stderr.isatty() and {"-h", "--help"}.isdisjoint(sys.argv):
        print("starting: libraries take some seconds to load", file=sys.stderr)


@contextmanager
def command(interrupted: str = "interrupted") -> Iterator[None]:
    """Carry out a command: exit 2 after one line for bad input, 130 or 143 when stopped."""
    from finemoe.trace import TraceError

    signal.signal(signal.SIGTERM, _stop)
    try:
        with file_errors():
            yield
    except (UserError, TraceError, HydraException, OmegaConfBaseException) as error:
        own = isinstance(error, UserError | TraceError)
        print(f"error: {error if own else config_error(error)}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt as interrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(128 + (interrupt.args or (signal.SIGINT,))[0]) from None


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def words_given(
    doc: str | None,
    defaults: Mapping[str, Any],
    words: Sequence[str] | None = None,
    only: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return ``key=value`` choices, of their defaults' types, and other words, or UserError."""
    given = sys.argv[1:] if words is None else words
    if not {"-h", "--help"}.isdisjoint(given):
        print((doc or "").replace("``", ""))
        print(*(f"default: {name}={value}" for name, value in defaults.items()), sep="\n")
        raise SystemExit(0)
    own = [word for word in given if word.partition("=")[0] in defaults and "=" in word]
    chosen = dict(word.split("=", 1) for word in own)
    typed = make_dataclass("Options", [(name, type(one), one) for name, one in defaults.items()])
    try:
        options: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(typed), chosen))
    except OmegaConfBaseException as error:
        choice = f"{error.full_key}={chosen.get(str(error.full_key))}"
        raise UserError(f"{choice}: {str(error).splitlines()[0]}") from error
    others = [word for word in given if word not in own]
    if others and only:
        raise UserError(f"{others[0]}: give key=value of {', '.join(defaults)}; see --help")
    return options, others


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


@contextmanager
def refusing(what: str, *kinds: type[Exception], remedy: str = "") -> Iterator[None]:
    """Turn errors of these kinds into UserError: `what`, why in the error's first line, remedy."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {cause_of(error)}{remedy and f'; {remedy}'}") from error


def config_error(error: Exception) -> str:
    """Return in one line what Hydra or OmegaConf found wrong with a command, and what to do."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = shlex.quote(f'{key}="{value}"')
        return f"{error.override}: not key=value; a value with = or , is quoted: {quoted}"
    text = str(error).partition("Config search path")[0].replace("\n\t", " ")
    lines = (line.strip(" .") for line in text.splitlines())
    cause = "; ".join(line for line in lines if line and not line.startswith("object_type"))
    launcher = re.search(r"hydra/launcher/(joblib|ray|submitit)", text)
    if launcher:
        extra = launcher[1].replace("submitit", "slurm")
        return f"{cause}; install it: pip install -e '.[{extra}]'"
    return f"{cause}; see --help"
