"""Compile the engine to C in place: ``make compiled``.

mypyc (mypyc.readthedocs.io) compiles the very modules that are otherwise interpreted, so answers
stay the same bit for bit; replays take about half the time. Policies are not compiled.
"""

from __future__ import annotations

from pathlib import Path

from mypyc.build import mypycify
from setuptools import setup

ENGINE = Path("finemoe/offload")
MODULES = (
    "cache",
    "model_thread",
    "replay",
    "residency",
    "timeline",
    "transfer",
    "virtual_links",
    "wishes",
)
LIBRARY = "finemoe.offload.engine"
"""Inside the package, where every way to start Python finds it."""


def main() -> None:
    """Build beside the sources; run it from the project's folder."""
    # What is not compiled is looked at for its types only, which torch's sources do not add to.
    flags = ["--config-file=", "--follow-imports=skip", "--ignore-missing-imports"]
    sources = [str(ENGINE / f"{module}.py") for module in MODULES]
    setup(
        name="finemoe-engine",
        packages=[],
        ext_modules=mypycify([*flags, *sources], opt_level="2", group_name=LIBRARY),
        script_args=["build_ext", "--inplace"],
    )


if __name__ == "__main__":
    main()
