"""Small dense models for the quantizer's tests, made by the code that made the stored checkpoints."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

CHECKPOINTS = Path(__file__).resolve().parent.parent / "data" / "checkpoints"


@pytest.fixture(scope="session")
def produce() -> ModuleType:
    """`produce/models.py`, which is no package because the producers run it in their own environments."""
    spec = importlib.util.spec_from_file_location("checkpoint_models", CHECKPOINTS / "produce" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dense_model(produce: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three decoder blocks, hidden 128, inner 256, no biases."""
    folder = tmp_path_factory.mktemp("dense")
    produce.write_model(folder, "even", layers=3)
    return folder


@pytest.fixture(scope="session")
def odd_model(produce: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder block, hidden 96, inner 160, a bias on every linear."""
    folder = tmp_path_factory.mktemp("odd")
    produce.write_model(folder, "odd")
    return folder


@pytest.fixture(scope="session")
def text(produce: ModuleType) -> str:
    """4 kB of text for the byte tokenizer."""
    return "\n".join(produce.text())
