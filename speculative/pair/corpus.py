"""Text to train and to measure on: the standard library of the running Python, and questions about it.

A file belongs to the held-out part by a hash of its path inside the library, so the split is the same on every
machine, whatever files a distribution adds or leaves out; the chat pairs of a file stay on the file's side.
Tests, generated tables and vendored packages are left out: they repeat themselves.
"""

import ast
import hashlib
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tokenmill.errors import ConfigurationError, InputError
from tokenmill.speculative.pair.chat import render

Part = Literal["train", "held_out"]

#: Folders (anywhere in a path) and file name beginnings that are no prose and no hand-written code.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "turtledemo",
        "ensurepip",
    }
)
_SKIPPED_NAMES = ("_sysconfigdata", "encodings/cp", "encodings/iso8859", "encodings/mac_", "encodings/koi8")
#: One file in this many is held out.
_HELD_OUT_SHARE = 20
#: A library with less text than this is a stripped one (zipped, or only compiled files); no model comes of it.
MINIMUM_BYTES = 1_000_000
#: Functions whose source is longer than this many characters are not asked for in a chat pair.
_LONGEST_ANSWER = 800


@dataclass(frozen=True)
class Document:
    """One text: a source file, or the chat pairs made from it.

    Attributes:
        path: The file's path inside the library, with `#chat` behind it for its chat pairs.
        text: The text; chat pairs already carry the chat template's markers.
        part: Which side of the split it is on.
    """

    path: str
    text: str
    part: Part

    @property
    def is_chat(self) -> bool:
        """Whether this is made of chat pairs."""
        return self.path.endswith("#chat")


@dataclass(frozen=True)
class Corpus:
    """Every document, sorted by path."""

    documents: tuple[Document, ...]

    def part(self, part: Part) -> tuple[Document, ...]:
        """The documents of one side, in an order shuffled by the hash of their paths, the same everywhere."""
        return tuple(sorted((d for d in self.documents if d.part == part), key=lambda d: _hash(d.path)))

    @cached_property
    def digest(self) -> str:
        """Hash of all paths and texts: two corpora with the same digest train the same model."""
        total = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            total.update(document.path.encode() + b"\0" + document.text.encode() + b"\0")
        return total.hexdigest()

    def size(self, part: Part) -> int:
        """Bytes of UTF-8 on one side."""
        return sum(len(document.text.encode()) for document in self.documents if document.part == part)


def part_of(path: str) -> Part:
    """The side of the split on which a path inside the library falls."""
    return "held_out" if _hash(path) % _HELD_OUT_SHARE == 0 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def read_library(root: Path | None = None) -> Corpus:
    """Reads a Python standard library, or any folder of Python files.

    Args:
        root: Its folder; default: that of the running interpreter.

    Raises:
        ConfigurationError: The folder holds less than `MINIMUM_BYTES` of source text, or no file of it is held out.
    """
    root = root or _standard_library()
    documents = [document for path in source_files(root) for document in _documents(path, root)]
    corpus = Corpus(tuple(sorted(documents, key=lambda document: document.path)))
    found = corpus.size("train") + corpus.size("held_out")
    if found < MINIMUM_BYTES:
        raise ConfigurationError(
            f"{root} holds {found} bytes of Python source and chat pairs, a pair needs {MINIMUM_BYTES}; "
            "run with a Python whose standard library is installed as source files, or name a larger folder"
        )
    if len({document.is_chat for document in corpus.part("held_out")}) < 2:
        raise ConfigurationError(
            f"{root} has no documented file that falls into the held-out part; name a folder with more files"
        )
    return corpus


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> Iterator[Path]:
    """The Python files worth reading, in the order of their paths."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not _SKIPPED_FOLDERS.intersection(name.split("/")) and not name.startswith(_SKIPPED_NAMES):
            yield path


def _documents(path: Path, root: Path) -> Iterator[Document]:
    """A file's source and its chat pairs; nothing if it does not parse."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text)
    except (SyntaxError, ValueError, OSError):
        return  # a template, or bytes that are no text
    name = path.relative_to(root).as_posix()
    yield Document(name, text, part_of(name))
    chat = "".join(chat_pairs(tree, text, name))
    if chat:
        yield Document(f"{name}#chat", chat, part_of(name))


def chat_pairs(tree: ast.Module, source: str, name: str) -> Iterator[str]:
    """Conversations about one module, in the chat template's markup.

    "What does X do?" is answered with the docstring of X, "Write the function X" with its source.
    """
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    lines = source.splitlines(keepends=True)
    overview = ast.get_docstring(tree)
    if overview:
        yield render([("user", f"What is the module {module} for?"), ("assistant", overview[:_LONGEST_ANSWER])])
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(doc) < 20:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield render(
            [("user", f"What does the {kind} {node.name} in {module} do?"), ("assistant", doc[:_LONGEST_ANSWER])]
        )
        code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        if kind == "function" and len(code) <= _LONGEST_ANSWER:
            asked = " ".join(doc.split("\n\n")[0].split())
            yield render([("user", f"Write the function {node.name}. {asked}"), ("assistant", code)])


def calibration_text(part: Part = "train", max_bytes: int = 1_000_000, root: Path | None = None) -> str:
    """Text for calibrating a quantizer (`train`) or for measuring perplexity (`held_out`).

    Files come in an order shuffled by the hash of their paths, each followed by its chat pairs, whole until the last,
    which is cut at the end of a line. No more files are read than needed.

    Args:
        part: The side of the split; the held-out side was never trained on.
        max_bytes: The most bytes of UTF-8 to return; all there is, if that is less.
        root: Folder of the library; default: that of the running interpreter.

    Raises:
        InputError: Unknown part, or `max_bytes` below 1.
        ConfigurationError: The folder holds no Python source of that part.
    """
    if part not in ("train", "held_out"):
        raise InputError(f"part={part!r} is not known; use 'train' or 'held_out'")
    if max_bytes < 1:
        raise InputError(f"max_bytes={max_bytes} is below 1; ask for at least one byte")
    root = root or _standard_library()
    names = {path.relative_to(root).as_posix(): path for path in source_files(root)}
    taken: list[bytes] = []
    room = max_bytes
    for name in sorted((name for name in names if part_of(name) == part), key=_hash):
        for document in _documents(names[name], root):
            data = document.text.encode()
            if len(data) > room:
                taken.append(data[: data.rfind(b"\n", 0, room) + 1])
                return b"".join(taken).decode()
            taken.append(data)
            room -= len(data)
    if not taken:
        raise ConfigurationError(f"{root} holds no Python source for the part {part!r}; name a folder with more files")
    return b"".join(taken).decode()
