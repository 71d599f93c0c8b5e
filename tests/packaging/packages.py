"""Building and installing packages for the packaging tests, without any index."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "engine", "quant", "speculative", "bench", "csrc")
#: Ninja, and what a C++ compiler driver looks for on PATH; nvcc is not among them.
COMPILER_TOOLS = ("c++", "g++", "clang++", "as", "ld", "sh", "ninja")
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "tests", "*.egg-info", "__pycache__", "*.so", "*.o", "*.log"
)


@dataclass(frozen=True)
class Built:
    """A wheel and what the build said."""

    wheel: Path
    output: str


def source_files(root: Path) -> set[str]:
    """Every file of the product below tokenmill/, as `tokenmill/kernels/spec.py`, also those behind its links."""
    found = set()
    for folder, folders, files in os.walk(root / "tokenmill", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {str((Path(folder) / name).relative_to(root)) for name in files if not name.endswith((".so", ".pyc"))}
    return found


def run_pip(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Runs this Python's pip without any index; its whole output, and a failure shows it."""
    command = [sys.executable, "-m", "pip", "--no-cache-dir", "--disable-pip-version-check", *arguments]
    answer = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


def build_wheel(source: Path, target: Path, path: Path) -> Built:
    """Builds `source` with nothing on PATH but the folder `path`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CXX")}
    output = run_pip(
        *("wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(target)),
        str(source),
        environment={**kept, "PATH": str(path)},
    )
    (wheel,) = target.glob("*.whl")
    return Built(wheel, output)
