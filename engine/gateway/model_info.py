"""What LiteLLM's clients are told about models: `/model/info`, in LiteLLM's words (docs.litellm.ai, model management).

Editors and chat programs read names, windows, prices and capabilities here, and have no models where there is nothing.
"""

from collections.abc import Iterable
from typing import Any

from tokenmill.engine.gateway.backends import Backend, Capability
from tokenmill.engine.gateway.money import MICRO_CENTS_PER_DOLLAR
from tokenmill.engine.gateway.portfolio import Target

PATHS = ("/v1/model/info", "/model/info")
_CAPABILITIES: dict[str, Capability] = {
    "supports_function_calling": "tools",
    "supports_vision": "vision",
    "supports_audio_input": "audio",
    "supports_response_schema": "json",
}
_MODES: dict[Capability, str] = {"embeddings": "embedding", "rerank": "rerank"}
#: Prices are kept for a million tokens.
_PER_TOKEN = MICRO_CENTS_PER_DOLLAR * 1_000_000


def described(names: Iterable[str], targets: Iterable[Target]) -> list[dict[str, Any]]:
    """One entry for each backend that serves one of these models; neither addresses nor keys are among it."""
    wanted = set(names)
    return [
        {
            "model_name": name,
            "litellm_params": {"model": f"{target.backend.protocol}/{target.backend.upstream_model(name)}"},
            "model_info": {"id": f"{target.backend.name}/{name}", "db_model": False, **_info(name, target)},
        }
        for target in targets
        for name in target.models
        if name in wanted
    ]


def _info(name: str, target: Target) -> dict[str, Any]:
    backend = target.backend
    able = backend.capabilities
    return {
        **backend.info,
        "key": backend.upstream_model(name),
        "litellm_provider": backend.protocol,
        "mode": next(
            (mode for capability, mode in _MODES.items() if capability in able), backend.info.get("mode", "chat")
        ),
        # What is not known is null: clients take their own default then, where 0 would be a window of nothing.
        "max_tokens": backend.max_output_tokens,
        "max_input_tokens": target.context_window,
        "max_output_tokens": backend.max_output_tokens,
        **_prices(backend),
        **{theirs: True if ours in able else None for theirs, ours in _CAPABILITIES.items()},
    }


def _prices(backend: Backend) -> dict[str, float]:
    prices = backend.prices
    found = {
        "input_cost_per_token": prices.prompt / _PER_TOKEN,
        "output_cost_per_token": prices.completion / _PER_TOKEN,
    }
    if prices.cached != prices.prompt:
        found["cache_read_input_token_cost"] = prices.cached / _PER_TOKEN
    written, hour = prices.writing
    if written != prices.prompt:
        found["cache_creation_input_token_cost"] = written / _PER_TOKEN
    if hour != written:
        found["cache_creation_input_token_cost_above_1hr"] = hour / _PER_TOKEN
    return found
