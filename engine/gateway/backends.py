"""What the gateway is told about a server it may send requests to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from tokenmill.engine.gateway.money import Prices
from tokenmill.errors import ConfigurationError

_VERSION = re.compile(r"/v[0-9]+(?:(?:alpha|beta)[0-9]*)?(?=/|$)")
#: What a request may need beyond plain text.
Capability = Literal["tools", "vision", "audio", "json", "logprobs", "embeddings", "rerank"]
#: A backend with one of these makes no text.
NO_TEXT: frozenset[str] = frozenset({"embeddings", "rerank"})


@dataclass(frozen=True)
class Backend:
    """One server that speaks the OpenAI (or Anthropic) protocol. Immutable; its state lives in `portfolio.Target`.

    Attributes:
        name: Unique name, used in logs, metrics and the circuit breaker.
        base_url: `http(s)://host[:port][/prefix]`, with or without a final `/v1`. A prefix that names a version itself
            (`/v1beta/openai`, `/api/v3`) is followed by the rest of OpenAI's paths, without `/v1`.
        tier: The tier it belongs to; a tier's name is accepted as a model name.
        defaults: What chat completions get that do not say it themselves, by field.
        read_timeout_s: Longest silence, before and during its answer; None: as for all.
        info: What else clients are told of its models, by field; see `model_info`.
        drop_unknown: Of Anthropic's: what its API has no counterpart of is left out of a chat completion, not refused.
        below_v1: Whether its paths are below `/v1`; if not, they follow the base URL without it.
        models: Public names of the models it serves. Empty: its own `/v1/models` says (asked by the health probe).
        model_names: Public model name to the backend's own name, where they differ; the request's `model` is
            rewritten on the way in, every other byte of each field stays.
        prefix: What the public names of the models that it lists itself begin with.
        api_key: Sent instead of the client's credentials. None: the client's `Authorization` passes through.
        protocol: What it speaks; `anthropic` is translated from and to chat completions, but for its own paths.
        health_path: Path of the health probe, from the server's root. None: health by outcome only.
        weight: Share of its tier's load relative to the tier's other backends, above 0.
        max_concurrency: Requests it may have open at once; more go elsewhere, or are refused with 429. Of this and the
            two limits that follow each gateway worker has an equal part, at least 1.
        requests_per_minute: Requests it may be sent in any minute; None: any number.
        tokens_per_minute: Tokens after which it gets no request until the minute is over; None: any number.
        canary: Share of its tier's requests, 0 to 1, that go to this backend, and no more while others of the tier
            are up; None: no canary.
        zone: `on-premises`, `edge` or `cloud`; residency policies read it.
        region: Free text, e.g. `eu-central`.
        version: Free text that names the model's version; shown in metrics and, where requests are routed, in the
            answer's header `x-tokenmill-version`.
        prices: What its tokens cost.
        context_window: Most tokens of a prompt and its answer together; None: not known.
        max_output_tokens: Most tokens of one answer; None: not known.
        capabilities: What its models can do beyond text in and text out.
        quality: Share of requests that it is expected to answer well, 0 to 1; None: not stated.
        prefix_cache: Whose requests find each other's prompts in its cache (`affinity.owner`); None: everybody's.
    """

    name: str
    base_url: str
    tier: str
    models: tuple[str, ...] = ()
    model_names: Mapping[str, str] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    protocol: Literal["openai", "anthropic"] = "openai"
    health_path: str | None = "/health"
    weight: float = 1.0
    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    canary: float | None = None
    zone: Literal["on-premises", "edge", "cloud"] = "on-premises"
    region: str | None = None
    version: str | None = None
    prices: Prices = field(default_factory=Prices)
    context_window: int | None = None
    max_output_tokens: int | None = None
    capabilities: tuple[Capability, ...] = ()
    quality: float | None = None
    prefix: str = ""
    below_v1: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)
    drop_unknown: bool = False
    read_timeout_s: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefix_cache: Literal["organisation", "team", "app", "key"] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigurationError(
                f"backend {self.name!r}: base_url={self.base_url!r} is not http(s)://host[:port][/prefix]"
            )
        if not self.weight > 0:
            raise ConfigurationError(f"backend {self.name!r}: weight={self.weight} must be above 0")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigurationError(
                f"backend {self.name!r}: max_concurrency={self.max_concurrency} must be at least 1"
            )
        if self.canary is not None and not 0 <= self.canary <= 1:
            raise ConfigurationError(f"backend {self.name!r}: canary={self.canary} must be within 0 and 1")

    @property
    def root(self) -> str:
        """The base URL without a final slash and `/v1`: request paths are appended to it."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def has_version(self) -> bool:
        """Whether request paths follow the base URL without their `/v1`."""
        base = self.base_url.rstrip("/")
        if self.protocol != "openai" or base.endswith("/v1"):
            return False
        return not self.below_v1 or bool(_VERSION.search(urlsplit(base).path))

    @property
    def makes_text(self) -> bool:
        """Whether it answers chats."""
        return NO_TEXT.isdisjoint(self.capabilities)

    def upstream_model(self, model: str) -> str:
        """The backend's own name of a public model name."""
        return self.model_names.get(model) or model.removeprefix(self.prefix)
