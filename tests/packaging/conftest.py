"""One sdist and the wheels made from it, each built once for all packaging tests; nothing is fetched."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.packages import COMPILER_TOOLS, LEFT_BEHIND, ROOT, Built, build_wheel, run_pip


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source") / "tokenmill"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_BEHIND)
    return copy


@pytest.fixture(scope="session")
def sdist(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(target), str(source_tree)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
    (archive,) = target.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def compilers_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PATH with the C++ compiler and ninja, and without nvcc."""
    folder = tmp_path_factory.mktemp("compilers")
    for name in COMPILER_TOOLS:
        found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if found:
            (folder / name).symlink_to(found)
    return folder


@pytest.fixture(scope="session")
def cpu_wheel(sdist: Path, compilers_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of a machine without nvcc, built from the sdist."""
    return build_wheel(sdist, tmp_path_factory.mktemp("cpu_wheel"), compilers_only)


@pytest.fixture(scope="session")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of a machine without any compiler, built from the sdist."""
    return build_wheel(sdist, tmp_path_factory.mktemp("pure_wheel"), tmp_path_factory.mktemp("empty_path"))


@pytest.fixture
def empty_environment(tmp_path: Path) -> Callable[..., Path]:
    """Makes an environment with one install and returns its Python.

    The dependencies (torch above all) are lent by the environment that runs the tests, appended behind the new one's
    own packages; its editable tokenmill is not among them, because a path that is lent processes no .pth files.
    """

    def make(*install: str, environment: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        lent = [path for path in sys.path if path.endswith("-packages")]
        (packages / "lent.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")
        run_pip(
            *("--python", str(python), "install", "--no-deps", "--no-index", "--no-build-isolation", *install),
            environment=environment,
        )
        return python

    return make
