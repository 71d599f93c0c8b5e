"""Seeded bugs: a kernel's source with one place changed, which the emulator must catch.

A mutant is data: which file, which text, what stands there instead, and which report it must give. The text must occur
exactly once, so that a mutant cannot silently stop being one when the kernel is edited.
"""

import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenmill.errors import InputError

#: What a mutant "gives" when no rule is broken but the numbers are wrong.
WRONG_RESULT = "WRONG RESULT"


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: What a person would call the bug; unique in its kernel.
        file: The file that is changed, relative to the kernel's source root.
        replace: Text that occurs exactly once in it.
        by: What stands there instead.
        reports: The kinds of report that name this bug, e.g. `RACE`, or `WRONG RESULT`; one of them must appear.
    """

    name: str
    file: str
    replace: str
    by: str
    reports: tuple[str, ...]


def mutated_text(mutant: Mutant, text: str) -> str:
    """The changed file.

    Raises:
        InputError: The text to replace occurs not exactly once, or the replacement changes nothing.
    """
    found = text.count(mutant.replace)
    if found != 1:
        raise InputError(
            f"mutant {mutant.name!r}: its text occurs {found} times in {mutant.file}; "
            "it must occur once: bring the mutant up to date with the kernel"
        )
    if mutant.replace == mutant.by:
        raise InputError(f"mutant {mutant.name!r} changes nothing")
    return text.replace(mutant.replace, mutant.by)


def write_mutated_tree(mutant: Mutant, root: Path, target: Path) -> None:
    """Copies the CUDA sources under `root` to `target` with the mutant's change in place."""
    for path in root.rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h") and path.is_file():
            copy = target / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    changed = target / mutant.file
    changed.write_text(mutated_text(mutant, (root / mutant.file).read_text(encoding="utf-8")), encoding="utf-8")


_KIND = re.compile(r"^([A-Z][A-Z ]{2,}):", flags=re.MULTILINE)


def naming_report(mutant: Mutant, reports: str) -> str | None:
    """The first report of a kind that names the mutant's bug, with its details; None when there is none."""
    bounds = [*(match.start() for match in _KIND.finditer(reports)), len(reports)]
    for start, end in pairwise(bounds):
        if any(reports.startswith(kind, start) for kind in mutant.reports):
            return reports[start:end].rstrip()
    return None
