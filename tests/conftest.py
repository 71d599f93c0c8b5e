"""What holds for every test of the suite."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores compute at once: threads of one would wait, spinning, for a core that another has.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tokenmill.engine.vllm import compiler, isa

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

#: Folders whose tests share something that is made once and is dear (an engine, servers, a wheel, compiled kernels, a
#: database): one process takes all of a folder, and of everything else a file at a time. Long files are named, too:
#: longest first, no process is left with a long one at the end.
TOGETHER = (
    "tests/end_to_end/",
    "tests/engine/",
    "tests/kernels/test_gates.py",
    "tests/emulator/",
    "tests/gateway/governance/",
    "tests/quant/",
    "tests/packaging/",
    "tests/gpu_builds/",
    "tests/speculative/pair/",
)

# Before any test computes: TOKENMILL_ISA makes the whole suite run as on a machine with less.
isa.narrow()
if compiler.why_not() is not None:
    compiler.disable()


def together(nodeid: str) -> str:
    """What of TOGETHER a test is in, else its file."""
    return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files that have such tests: a machine for kernels alone lacks the packages of the others."""
    if config.option.markexpr != "gpu":
        return None
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    return not any("pytest.mark.gpu" in file.read_text(encoding="utf-8") for file in files) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts what is long first, each and everything else in the random order that it has."""
    places = {folder: place for place, folder in enumerate(TOGETHER)}
    items.sort(key=lambda item: places.get(together(item.nodeid), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling":
    """Distributes for `pytest -n` what belongs together together."""
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    config.option.loadscopereorder = False
    return Folders(config, log)
