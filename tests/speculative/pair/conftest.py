"""A small library to learn from, and one finished miniature pair, both made once."""

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenmill.cli import main
from tokenmill.speculative.pair.corpus import MINIMUM_BYTES, part_of, source_files

#: Steps of the miniature runs: enough to learn letter frequencies, and for a kill to land in the middle.
STEPS = "40"


def copy_files(out: Path, size: int) -> Path:
    """A folder with files of the running Python's library, in path order, `size` bytes or a little more."""
    root = Path(sysconfig.get_path("stdlib"))
    copied = 0
    for path in source_files(root):
        if copied >= size and any(part_of(p.relative_to(out).as_posix()) == "held_out" for p in out.rglob("*.py")):
            break
        place = out / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        copied += path.stat().st_size
    return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest library that the command takes."""
    return copy_files(tmp_path_factory.mktemp("library"), MINIMUM_BYTES)


@pytest.fixture(scope="session")
def arguments(library: Path) -> list[str]:
    """The command line of a miniature run, without its output folder."""
    return [
        "train-pair",
        "--size",
        "miniature",
        "--steps",
        STEPS,
        "--library",
        str(library),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]


@pytest.fixture(scope="session")
def pair(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished miniature pair, made by the command without interruption."""
    out = tmp_path_factory.mktemp("finished") / "pair"
    assert main([*arguments, "--out", str(out)]) == 0
    return out
