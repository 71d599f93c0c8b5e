"""LiteLLM files of tests: written, converted, and their backends."""

from pathlib import Path

import pytest

from tokenmill import env
from tokenmill.engine.gateway import litellm, litellm_prices, yaml_file
from tokenmill.engine.gateway.backend_section import RemoteBackend
from tokenmill.engine.gateway.config import Config


@pytest.fixture(autouse=True)
def no_cost_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file says is all that there is; test_litellm_prices.py is about the rest."""
    monkeypatch.delenv(env.LITELLM_PRICES.name, raising=False)
    monkeypatch.delenv(litellm_prices.URL_VARIABLE, raising=False)
    monkeypatch.setattr(litellm_prices, "installed", lambda: None)
    for name in (env.STORE.name, "LITELLM_MASTER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-usual")


def convert(folder: Path, text: str) -> litellm.Imported:
    path = folder / "proxy.yaml"
    path.write_text(text, encoding="utf-8")
    return litellm.convert(yaml_file.read(path))


def model(name: str, parameters: str, more: str = "") -> str:
    return f"  - {{model_name: {name!r}, litellm_params: {{{parameters}}}{more}}}\n"


def backends(config: Config, tier: str) -> list[RemoteBackend]:
    found = config.tiers[tier].backends
    assert all(isinstance(backend, RemoteBackend) for backend in found)
    return found  # type: ignore[return-value]
