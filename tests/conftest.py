"""What holds for every test of the suite."""

from pathlib import Path

import pytest

from tokenmill.engine.vllm import isa

# Before any test computes: TOKENMILL_ISA makes the whole suite run as on a machine with less.
isa.narrow()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files that have such tests: a machine for kernels alone lacks the packages of the others."""
    if config.option.markexpr != "gpu":
        return None
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    return not any("pytest.mark.gpu" in file.read_text(encoding="utf-8") for file in files) or None
