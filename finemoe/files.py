"""Files that appear whole or not at all, whatever ends the process that writes them."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def cause_of(error: Exception) -> str:
    """Return in one line what an error says; of pydantic's, the first value that is amiss."""
    from pydantic import ValidationError

    text = str(getattr(error, "strerror", None) or error).strip()
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        text = f"{'.'.join(map(str, first['loc']))!a}: {first['msg']}"
    return (text or type(error).__name__).splitlines()[0]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name to write to; the file becomes `path` if the block ends well, else it is removed.

    Two processes may write the same path at once. Raises OSError with the path as its file name.
    """
    partial = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(path)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, partial, str(partial)):
            error.filename = str(path)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file that is either whole or not there."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")


def write_csv(path: Path, table: Any) -> None:
    """Write a data frame, without its index, to a file that is either whole or not there."""
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)


def partial_name(path: Path) -> Path:
    """Return a hidden name beside `path`, this process's own; remove those of dead processes."""
    host = socket.gethostname()
    for left in path.parent.glob(f".*.{host}.*.partial"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not _lives(int(process)):
            # Another process may do the same, or it may be another user's.
            with suppress(OSError):
                left.unlink()
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.partial")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
