"""Prompts: from conversations, on the hub or in a file, and from the standard library's text.

Of the latter a tenth of the documents, by a hash of their name, is held out, without passages that
stand in a training document too.
"""

import ast
import hashlib
import inspect
import json
import math
import platform
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice, pairwise, takewhile
from pathlib import Path
from pydoc_data.topics import topics
from reprlib import repr as short
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator

from experiments.errors import UserError, refusing
from experiments.run.weights import hub_access, loading

Kind = Literal["docs", "code"]

TURNS = ("conversation", "conversations")
HUMANS = ("user", "human")
SUFFIXES = (".json", ".jsonl", ".parquet")
SENTINEL = 'A prompt, <b>as LONG & odd</b> as "real" ones:\n\n  {{ it }}' * 50 + "!"
EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "pydoc_data",
    "encodings", "ensurepip", "lib2to3", "lib-dynload", "turtledemo", "__pycache__",
}  # fmt: skip
HELD_OUT_ONE_IN = 10
DEFINITION = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Dataset:
    """Texts from which prompts are drawn, and where they come from."""

    name: str
    source: str
    texts: tuple[str, ...]


def origin_of(dataset: Dataset, prompts: list[tuple[int, ...]]) -> dict[str, str]:
    """Return what records say of where prompts come from, with the hash of what was drawn."""
    digest = hashlib.sha256(repr(prompts).encode()).hexdigest()
    return {"dataset": dataset.name, "dataset_source": dataset.source, "dataset_sha256": digest}


def corpus_dataset(name: str, kind: Kind) -> Dataset:
    """Return held-out passages of the running Python's standard library, never trained on."""
    source = f"Python {platform.python_version()} standard library, held-out documents"
    return Dataset(name, source, corpus_texts(kind, held_out=True))


def corpus_texts(kind: str, held_out: bool) -> tuple[str, ...]:
    """Return passages of a kind: of held-out documents, or of those that models learned from."""
    wanted = (one for one in documents() if (one.kind, one.held_out) == (kind, held_out))
    return tuple(dict.fromkeys(text.strip() for one in wanted for text in one.passages))


def _there(path: str) -> str:
    if Path(path).suffix in SUFFIXES and not Path(path).is_file():
        raise ValueError("there is no file; give dataset.path a json, jsonl or parquet file")
    return path


Source = Annotated[str, AfterValidator(_there)]


def conversations(name: str, path: Source, split: str, data_files: str | None = None) -> Dataset:
    """Return the first human turn of each conversation of a hub dataset or a local file.

    A row is an object with `conversation` or `conversations`, a list of turns: role and content
    (LMSYS-Chat-1M), or from and value (ShareGPT). Any other row is skipped; standard error and the
    source say how many, and what the first was. Raises UserError if the data is missing, gated or
    unreadable, or no row is left.
    """
    if Path(path).suffix in SUFFIXES:
        rows = _local_rows(Path(path))
    else:
        import datasets

        with hub_access(), loading(f"the dataset {path}", "dataset=docs is always there"):
            rows = datasets.load_dataset(path, data_files=data_files, split=split)
    texts, causes, source = list[str](), list[str](), path
    for number, row in enumerate(rows, 1):
        try:
            texts.append(_first_turn(row))
        except ValueError as error:
            causes.append(f"row {number}: {error}")
    if not texts:
        raise UserError(f"{path} holds no usable prompt: {[*causes, 'no rows'][0]}")
    if causes:
        skipped = f"skipped {len(causes)} row{'s' * (len(causes) > 1)}"
        print(f"{skipped} of {path}: {causes[0]}", file=sys.stderr)
        source = f"{path} ({skipped} of {len(texts) + len(causes)})"
    return Dataset(name, source, tuple(dict.fromkeys(texts)))


def draw_prompts(
    dataset: Dataset, tokenizer: Any, count: int, input_tokens: int, seed: int
) -> list[tuple[int, ...]]:
    """Draw prompts by seed, each cut to exactly `input_tokens` tokens, a chat template's included.

    Raises UserError if too few texts are that long.
    """
    before, after = template(tokenizer)
    room = input_tokens - len(before) - len(after)
    if room < 1:
        cause = f"input_tokens={input_tokens} leaves no room beside the chat template's"
        raise UserError(f"{cause} {len(before) + len(after)} tokens; raise it")
    texts = list(dataset.texts)
    random.Random(seed).shuffle(texts)
    tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    long = ((*before, *ids[:room], *after) for ids in tokens if len(ids) >= room)
    if len(prompts := list(islice(long, count))) < count:
        have = (
            f"{len(prompts)} texts of {dataset.name} have {input_tokens} tokens, {count} are needed"
        )
        raise UserError(f"only {have}; lower workload.input_tokens or workload.prompts")
    return prompts


def prompts_of(
    lengths: Sequence[int], dataset: Dataset, tokenizer: Any, seed: int
) -> tuple[list[tuple[int, ...]], int]:
    """Return one prompt of exactly each length, and how many passes over the texts that took.

    A prompt is a run of consecutive texts, joined by blank lines and cut at its end. The next
    prompt goes on with the next text, so that no text is used twice before all were; where the
    first starts, and which request gets which run, is drawn by seed. The chat template is counted
    in; a prompt without room for it and one more token goes without.
    """
    around = template(tokenizer)
    order, draw = list(range(len(lengths))), random.Random(seed)
    draw.shuffle(order)
    start, used = draw.randrange(len(dataset.texts)), 0
    texts = cycle((*dataset.texts[start:], *dataset.texts[:start]))
    prompts: list[tuple[int, ...]] = [()] * len(lengths)
    for index in order:
        room = lengths[index] - sum(map(len, around))
        before, after = around if room >= 1 else ([], [])
        wanted, tokens = lengths[index] - len(before) - len(after), list[int]()
        while len(tokens) < wanted:
            tokens += tokenizer(next(texts) + "\n\n", add_special_tokens=False)["input_ids"]
            used += 1
        prompts[index] = (*before, *tokens[:wanted], *after)
    return prompts, math.ceil(used / len(dataset.texts))


def shared_prefixes(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """Return of each prompt how many first tokens it shares with the other that shares most."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shared = [0] * len(prompts)
    # In sorted order, that other one is a neighbour.
    for one, other in pairwise(order):
        pairs = zip(prompts[one], prompts[other], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        shared[one], shared[other] = max(shared[one], length), length
    return shared


def template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids around a prompt; UserError if the chat template fails or alters it."""
    if not getattr(tokenizer, "chat_template", None):
        return [one for one in (tokenizer.bos_token_id,) if one is not None], []
    turn = [{"role": "user", "content": SENTINEL}]
    what, remedy = "the tokenizer's chat template", "remove or replace its chat template"
    with loading(what, remedy):
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    parts = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in text.split(SENTINEL)]
    if len(parts) != 2:
        raise UserError(f"{what} alters, drops or repeats text; {remedy}")
    return parts[0], parts[1]


def _local_rows(path: Path) -> list[Any]:
    """Return the rows of a file: of JSON, those of a list, or one row, or one row per line."""
    kinds = (OSError, ValueError, RecursionError, pa.ArrowException)
    with refusing(f"cannot read {path} as {path.suffix[1:]}", *kinds, remedy="mend or replace it"):
        if path.suffix == ".parquet":
            names = pq.read_schema(path).names
            columns = [name for name in TURNS if name in names]
            if not columns:
                raise ValueError(f"it has the columns {short(names)}, none of {', '.join(TURNS)}")
            return pq.read_table(path, columns=columns).to_pylist()
        content = path.read_bytes()
        try:
            rows = json.loads(content)
            return rows if isinstance(rows, list) else [rows]
        except ValueError:
            if path.suffix == ".json" and content.lstrip().startswith(b"["):
                raise
            return [json.loads(line) for line in content.split(b"\n") if line.strip()]


def _first_turn(row: Any) -> str:
    """Return what a human said first; ValueError with the cause if the row does not tell."""
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} where an object is due")
    turns = next((row[name] for name in TURNS if row.get(name) is not None), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"no list of turns as {' or '.join(TURNS)}; only {short([*row])}")
    speakers = [turn.get("role") or turn.get("from") for turn in turns]  # LMSYS, or ShareGPT
    first = next((i for i, speaker in enumerate(speakers) if speaker in HUMANS), None)
    if first is None:
        raise ValueError(f"no turn by {' or '.join(HUMANS)}, only by {short(speakers)}")
    text = turns[first].get("content") or turns[first].get("value")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text in turn {first + 1}, but {short(text)}")
    # A half of a surrogate pair, which JSON can hold, is no text for a tokenizer.
    return text.strip().encode("utf-8").decode()


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

    def body(passage: str) -> str:
        """Return a passage without the qualified name that a docstring stands under."""
        return passage.split("\n\n", 1)[-1].strip()

    seen = {body(one) for document in every if not document.held_out for one in document.passages}
    for number, document in enumerate(every):
        if document.held_out:
            passages = tuple(one for one in document.passages if body(one) not in seen)
            every[number] = replace(document, passages=passages)
    return tuple(every)


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
