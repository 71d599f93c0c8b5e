"""From a configuration to the processes that serve it: command lines, environments, and what the gateway is told."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.engine.gateway.backend_section import LocalBackend, Price, RemoteBackend, Speculation
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.config import Config, Server
from tokenmill.engine.gateway.governance.options import Options
from tokenmill.engine.gateway.money import Prices, micro_cents
from tokenmill.engine.gateway.observability.options import Options as ObservabilityOptions
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Settings
from tokenmill.errors import ConfigurationError
from tokenmill.models import tiny_pair

#: `python -P`: the working directory is not searched, so a folder there cannot stand in for a package.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "tokenmill.engine.vllm.launch")
#: The longest n-gram that is looked up; vLLM wants it named.
NGRAM_LONGEST = 4


@dataclass(frozen=True)
class Engine:
    """One vLLM server to start.

    Attributes:
        backend: Its part of the configuration.
        name: Name in logs, progress and metrics; unique.
        tier: The tier it belongs to.
        quality: The tier's quality.
        command: Program and arguments, all but where to listen.
        environment: Its whole environment, all but what the supervisor adds at each start.
    """

    backend: LocalBackend
    name: str
    tier: str
    quality: float | None
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def gateway_backend(self, port: int) -> Backend:
        """What the gateway is told about it."""
        adapters = any(part.startswith(("--lora-modules", "--enable-lora")) for part in self.command)
        return Backend(
            base_url=f"http://127.0.0.1:{port}",
            # Adapters add model names of their own: the engine's list has them all.
            models=() if adapters else tuple(self.backend.public_names),
            **_common(self.name, self.tier, self.backend, self.quality),
        )


@dataclass(frozen=True)
class Plan:
    """Everything that `tokenmill serve` runs.

    Attributes:
        server: Where clients connect.
        engines: The vLLM servers to start.
        remotes: The servers elsewhere, as the gateway sees them.
        fallbacks, context_window_fallbacks, content_policy_fallbacks: Tier to the tiers that take over from it, when
            it fails, when a prompt is too long for it, when it refuses a request's content.
        governance: Who may ask for what; None: everybody for everything.
        observability: What the gateway tells about its work.
        routing: How requests are routed that name no concrete model; None: they are not.
        sensitivity: Where requests with sensitive data may go; None: anywhere.
    """

    server: Server
    engines: tuple[Engine, ...]
    remotes: tuple[Backend, ...]
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    context_window_fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    content_policy_fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    governance: Options | None = None
    observability: ObservabilityOptions = field(default_factory=ObservabilityOptions)
    routing: RoutingSettings | None = None
    sensitivity: SensitivitySettings | None = None

    def settings(self) -> Settings:
        """The gateway's settings."""
        return Settings(
            drain_s=self.server.drain_seconds,
            max_body_bytes=int(self.server.max_body_mb * (1 << 20)),
            read_timeout_s=self.server.read_timeout_seconds,
            breaker_failures=self.server.breaker_failures,
            breaker_cooldown_s=self.server.breaker_cooldown_seconds,
            most_retries=self.server.retries,
            fallbacks=self.fallbacks,
            context_window_fallbacks=self.context_window_fallbacks,
            content_policy_fallbacks=self.content_policy_fallbacks,
            workers=self.server.workers,
            default_model=self.server.default_model,
            allowed_origins=tuple(self.server.allowed_origins),
        )


def make_plan(config: Config, engine_arguments: Sequence[str] = ()) -> Plan:
    """Works out the processes of a configuration.

    Args:
        config: The configuration.
        engine_arguments: vLLM flags from the command line, appended unchanged to every local server.

    Raises:
        ConfigurationError: An API key or the master key is missing, or `bundled:` names no bundled model.
    """
    engines, remotes = [], []
    for name, tier, backend in config.named_backends():
        quality = config.tiers[tier].quality
        if isinstance(backend, RemoteBackend):
            remotes.append(_remote(name, tier, backend, quality))
        else:
            arguments = [*engine_flags(backend), *engine_arguments]
            command = (*ENGINE_COMMAND, resolve_model(backend.model), *arguments)
            engines.append(Engine(backend, name, tier, quality, command, _environment(backend)))
    tiers = config.tiers.items()
    return Plan(
        config.server,
        tuple(engines),
        tuple(remotes),
        {name: tuple(tier.fallbacks) for name, tier in tiers if tier.fallbacks},
        {name: tuple(tier.context_window_fallbacks) for name, tier in tiers if tier.context_window_fallbacks},
        {name: tuple(tier.content_policy_fallbacks) for name, tier in tiers if tier.content_policy_fallbacks},
        None if config.governance is None else config.governance.options(),
        config.observability.options(config.governance is not None),
        None if config.routing is None else config.routing.settings(),
        None if config.sensitivity is None else config.sensitivity.settings(),
    )


def gateway_command(descriptor: int) -> tuple[str, ...]:
    """Program and arguments of a gateway worker that inherits a listening socket as `descriptor`."""
    return (sys.executable, "-P", "-m", "tokenmill.engine.gateway.worker", "--fd", str(descriptor))


def resolve_model(model: str) -> str:
    """`bundled:target` and `bundled:draft` become folders; anything else stays what vLLM makes of it."""
    if not model.startswith("bundled:"):
        return model
    bundled = dict(zip(("bundled:target", "bundled:draft"), tiny_pair(), strict=True))
    if model not in bundled:
        raise ConfigurationError(f"{model!r} does not come with Tokenmill; use {' or '.join(bundled)}")
    return str(bundled[model])


def engine_flags(backend: LocalBackend) -> list[str]:
    """The `vllm serve` flags of one local backend, without model, host and port."""
    flags = ["--served-model-name", *backend.public_names]
    for name, value in backend.flags.items():
        flags += _flag(name, value)
    if backend.speculation is not None:
        flags += ["--speculative-config", json.dumps(_speculative_config(backend.speculation))]
    return flags


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{name}", *(json.dumps(item) if isinstance(item, (dict, list)) else str(item) for item in value)]
    return [f"--{name}={value}"]


def _speculative_config(speculation: Speculation) -> dict[str, Any]:
    if speculation.model is None:
        return {
            "method": "ngram",
            "num_speculative_tokens": speculation.tokens,
            "prompt_lookup_max": NGRAM_LONGEST,
        }
    return {
        "method": "draft_model",
        "model": resolve_model(speculation.model),
        "num_speculative_tokens": speculation.tokens,
    }


def _environment(backend: LocalBackend) -> dict[str, str]:
    environment = dict(os.environ)
    # The programs of our own environment (ninja, for one) are found although it need not be activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    return environment | backend.env


def _remote(name: str, tier: str, backend: RemoteBackend, quality: float | None) -> Backend:
    return Backend(
        base_url=backend.url,
        below_v1=backend.below_v1,
        info=backend.info,
        drop_unknown=backend.drop_unknown,
        read_timeout_s=backend.read_timeout_seconds,
        defaults=backend.defaults,
        models=tuple(backend.models),
        model_names=backend.models,
        prefix=backend.prefix,
        api_key=backend.secret(),
        protocol=backend.protocol,
        health_path=backend.health_path,
        **_common(name, tier, backend, quality),
    )


def prices(price: Price, protocol: str = "openai") -> Prices:
    """A configured price in the gateway's unit, of a backend that speaks a protocol."""
    cached = price.input if price.cached is None else price.cached
    writing = [None if one is None else micro_cents(one) for one in price.writing(protocol)]
    return Prices(micro_cents(price.input), micro_cents(cached), micro_cents(price.output), *writing)


def _common(name: str, tier: str, backend: LocalBackend | RemoteBackend, quality: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "tier": tier,
        "weight": backend.weight,
        "max_concurrency": backend.max_concurrency,
        "requests_per_minute": backend.requests_per_minute,
        "tokens_per_minute": backend.tokens_per_minute,
        "canary": backend.canary,
        "zone": backend.zone,
        "region": backend.region,
        "version": backend.version,
        "prices": prices(backend.price, backend.protocol if isinstance(backend, RemoteBackend) else "openai"),
        "context_window": backend.context_window,
        "max_output_tokens": backend.max_output_tokens,
        "capabilities": tuple(backend.capabilities),
        "quality": quality,
        "prefix_cache": backend.prefix_cache,
    }
