"""Compile the engine to C in place: ``make compiled``.

Cython (cython.readthedocs.io, "pure Python mode") compiles the very modules that are otherwise
interpreted; the .pxd file beside each says what of it has a C type. Answers stay the same, replays
take a fraction of the time. Policies are not compiled.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

from experiments.errors import BAD_INPUT, words_given

ENGINE = Path("finemoe/offload")
BUILD = Path("build/cython")


def main() -> None:
    """Build beside the sources; run it from the project's folder."""
    words_given(__doc__, {})
    workers = os.cpu_count() or 1
    modules = sorted(path.stem for path in ENGINE.glob("*.pxd"))
    extensions = [
        Extension(
            f"finemoe.offload.{module}",
            [str(ENGINE / f"{module}.py")],
            extra_compile_args=["-O2", "-g0", "-Wno-unreachable-code"],
        )
        for module in modules
    ]
    compiled = cythonize(
        extensions,
        build_dir=str(BUILD),
        language_level=3,
        nthreads=workers,
        quiet=True,
        show_all_warnings=False,
        # Types are those of the .pxd files; annotations in the sources are for mypy.
        compiler_directives={
            "annotation_typing": False,
            # Of what is never negative, such as a place: there C divides as Python does.
            "cdivision": True,
            "show_performance_hints": False,
            "warn.unreachable": False,
        },
    )
    setup(
        name="finemoe-engine",
        packages=[],
        ext_modules=compiled,
        script_args=["--quiet", "build_ext", "--inplace", "--parallel", str(workers)],
    )


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stop:
        print(f"{stop}; a C compiler such as gcc is needed, or go on interpreted", file=sys.stderr)
        sys.exit(BAD_INPUT)
