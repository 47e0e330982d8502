"""Text that every Python installation carries: the standard library's documentation and source.

Every ``.py`` file gives its source and its docstrings, every topic of the language reference its
text. A tenth of the documents, by a hash of their name, is held out: a file's source and docstrings
together, and without passages that stand in a training document too.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Kind = Literal["docs", "code"]

EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "pydoc_data",
    "encodings", "ensurepip", "lib2to3", "lib-dynload", "turtledemo", "__pycache__",
}  # fmt: skip
HELD_OUT_ONE_IN = 10
DEFINITION = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One text of the corpus; `passages` are the units from which prompts are drawn."""

    name: str
    kind: Kind
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.passages)

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@cache
def documents() -> tuple[Document, ...]:
    """Return every document of the running Python, sorted by kind and name."""
    every = sorted(_all_documents(), key=lambda document: (document.kind, document.name))
    seen = {_body(one) for document in every if not document.held_out for one in document.passages}
    for number, document in enumerate(every):
        if document.held_out:
            passages = tuple(one for one in document.passages if _body(one) not in seen)
            every[number] = replace(document, passages=passages)
    return tuple(every)


def _body(passage: str) -> str:
    """Return a passage without the qualified name that a docstring stands under."""
    return passage.split("\n\n", 1)[-1].strip()


def _all_documents() -> Iterator[Document]:
    for name, text in topics.items():
        paragraphs = tuple(part for part in text.split("\n\n") if part.strip())
        yield Document(f"topics/{name}", "docs", paragraphs)
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        name = relative.with_suffix("").as_posix().replace("/", ".")
        if docstrings := tuple(_docstrings(tree, name)):
            yield Document(name, "docs", docstrings)
        if blocks := tuple(_blocks(tree, source)):
            yield Document(name, "code", blocks)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | DEFINITION):
        if text := ast.get_docstring(node):
            yield f"{name}\n\n{inspect.cleandoc(text)}"
        for child in node.body:
            if isinstance(child, DEFINITION):
                yield from _docstrings(child, f"{name}.{child.name}")


def _blocks(tree: ast.Module, source: str) -> Iterator[str]:
    """Yield the source cut before every top-level class or function."""
    lines = source.splitlines(keepends=True)
    nodes = [node for node in tree.body if isinstance(node, DEFINITION)]
    cuts = [min(one.lineno for one in (node, *node.decorator_list)) - 1 for node in nodes]
    for start, stop in pairwise([0, *cuts, len(lines)]):
        if block := "".join(lines[start:stop]).strip("\n"):
            yield block
