"""Measurements as JSON lines: written as they come, whole or not at all, and continued after a kill.

A row is a flat dictionary. The first line that was cut by a kill is dropped when the file is opened again; of
groups that were measured more than once the least disturbed measurement counts.
"""

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmill.errors import InputError

Row = dict[str, Any]

#: What identifies a measurement.
KEY = ("op", "device", "isa", "threads", "K", "N", "group_size", "M", "implementation")
#: What identifies a group: everything but who.
GROUP = KEY[:-1]


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files, in order.

    Raises:
        InputError: A file is missing or a line is no JSON object; names the file and the line.
    """
    return [row for path in paths for row in _rows_of(path)]


def _rows_of(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON ({error.msg}); remove the line or measure again") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number} is not a JSON object; remove the line or measure again")
        yield row


def least_disturbed(rows: Iterable[Row]) -> list[Row]:
    """Of several measurements of one group, the one whose contestants took the least time together.

    A neighbour's load only ever adds time. The rule looks at the sum over all contestants, not at any ratio between
    them, so it favours nobody; the other measurements stay in the file.

    Args:
        rows: Rows with the fields of `KEY` and the `time` at which their group was measured.

    Returns:
        The rows of the chosen measurements, groups in the order in which they first appear.
    """
    runs: dict[tuple[Any, ...], dict[Any, list[Row]]] = {}
    for row in rows:
        runs.setdefault(identity(row, GROUP), {}).setdefault(row.get("time"), []).append(row)
    return [row for found in runs.values() for row in min(found.values(), key=_seconds)]


def _seconds(rows: Sequence[Row]) -> float:
    return float(sum(row["p50"] for row in rows if "p50" in row))


def identity(row: Mapping[str, Any], key: Sequence[str]) -> tuple[Any, ...]:
    """The values of a row's key fields."""
    return tuple(row.get(field) for field in key)


def source_commit() -> str:
    """The commit that is checked out, with `+` where product files differ from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc/int4_gemm", "kernels/int4_gemm")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class RowFile:
    """A file of rows that is open for appending.

    Args:
        path: Created with its folders; a last line without its newline is cut off first.

    Attributes:
        rows: What was in the file and what was appended since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_half_line(path)
        self.rows: list[Row] = list(_rows_of(path)) if path.exists() else []

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


def _cut_half_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
