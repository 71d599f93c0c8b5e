"""Kernels of the emulator's own tests, compiled once per session into the cache."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill.kernels import emulator
from tokenmill.kernels.emulator import EmulatedLibrary

KERNELS = Path(__file__).parent / "kernels"


@pytest.fixture(scope="session")
def kernels() -> Callable[[str], EmulatedLibrary]:
    """`kernels("hazards")` is the loaded library of kernels/hazards.cu."""
    return lambda name: emulator.load(KERNELS / f"{name}.cu")
