"""The configuration of `tokenmill serve`: one typed file that names tiers and the servers behind each.

`docs/configuration.md` is made from the descriptions below by `tokenmill.engine.gateway.config_reference`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from tokenmill.engine.gateway import yaml_file
from tokenmill.engine.gateway.backend_section import AnyBackend, LocalBackend, RemoteBackend, model_name, plain_name
from tokenmill.engine.gateway.config_problems import explain
from tokenmill.engine.gateway.governance.section import Governance
from tokenmill.engine.gateway.observability.section import Observability
from tokenmill.engine.gateway.router.section import Routing
from tokenmill.engine.gateway.sections import Section
from tokenmill.engine.gateway.sensitivity.section import Sensitivity
from tokenmill.errors import ConfigurationError

#: What a browser's `Origin` header says of a page: no default port, no path.
_ORIGIN = re.compile(r"(?!http://[^/]*:80$|https://[^/]*:443$)[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")


class Server(Section):
    """Where clients connect, and how the gateway treats them."""

    host: str = Field("127.0.0.1", description="Address to listen on; `0.0.0.0` for every interface.", min_length=1)
    port: int = Field(8000, description="TCP port; 0 takes a free one.", ge=0, le=65535)
    workers: int = Field(1, description="Gateway processes that share the port.", ge=1, le=256)
    allowed_origins: list[str] = Field(
        default_factory=list,
        description="Origins of web pages that may use the API from a browser, `https://chat.example.org` or `*` for "
        "all; default: none. `/admin`, `/key`, `/dashboard` and `/metrics` are open to none.",
    )
    drain_seconds: float = Field(
        30.0, description="After SIGTERM or Ctrl-C, open requests may go on for this long.", ge=0, le=86_400
    )
    default_model: str | None = Field(
        None, description="Model or tier for requests that name none; default: the sole tier's model."
    )
    max_body_mb: float = Field(
        64.0, description="Longest request body in MiB; more is refused with 413.", gt=0, le=4096
    )
    read_timeout_seconds: float = Field(
        600.0, description="Longest silence of a backend, before and during its answer; then 504.", gt=0, le=86_400
    )
    retries: int | None = Field(
        None,
        description="Most times that one request is sent again to another backend of the same tier, only where that "
        "is safe; default: until every backend was asked.",
        ge=0,
        le=100,
    )
    breaker_failures: int = Field(
        5, description="Failures in a row after which a backend is not asked for a model for a while.", ge=1, le=100_000
    )
    breaker_cooldown_seconds: float = Field(
        2.0, description="How long that is the first time; it doubles with each failure after it.", gt=0, le=86_400
    )

    @field_validator("default_model")
    @classmethod
    def _default_can_be_asked_for(cls, value: str | None) -> str | None:
        return value if value is None else model_name(value)

    @field_validator("allowed_origins")
    @classmethod
    def _origins_are_such(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin[:200]!r} is no origin as browsers write it; give scheme://host[:port] in lower case, "
                    "nothing behind, or '*'"
                )
        return value


class Tier(Section):
    """Servers that can stand in for each other; clients may use the tier's name as the model name."""

    quality: float | None = Field(
        None,
        description="Share of requests that it answers well enough, as measured or judged; the router compares tiers "
        "by it.",
        ge=0,
        le=1,
    )
    fallbacks: list[str] = Field(
        default_factory=list,
        description="Tiers that take over, in this order, when none of this one's backends can serve a request, or all "
        "that were asked failed (408, 429, 5xx, silence; 401, 403, 404 where the client is not to blame).",
    )
    context_window_fallbacks: list[str] = Field(
        default_factory=list,
        description="Tiers that take over when a prompt is too long for this one; default: `fallbacks`.",
    )
    content_policy_fallbacks: list[str] = Field(
        default_factory=list,
        description="Tiers that take over when a backend of this one refuses a request for its content; default: none.",
    )
    backends: list[AnyBackend] = Field(
        description="One or more. With `url` it is a server elsewhere, otherwise a local vLLM server.", min_length=1
    )


class Config(Section):
    """The whole file."""

    server: Server = Field(default_factory=Server, description="Where clients connect.")
    tiers: dict[str, Tier] = Field(
        description="Tier name (letters, digits, `.`, `_`, `-`) to its backends.", min_length=1
    )
    governance: Governance | None = Field(
        None, description="Keys, budgets, rate limits, ledger; default: none of them."
    )
    observability: Observability = Field(
        default_factory=Observability, description="What the gateway tells about its work besides `/metrics`."
    )

    routing: Routing | None = Field(
        None,
        description="How requests for `auto` are routed, and which zones are asked first; default: not at all, and "
        "`auto` is the sole tier that makes text.",
    )
    sensitivity: Sensitivity | None = Field(
        None, description="Where requests with personal or secret data may go; default: anywhere."
    )

    @field_validator("tiers")
    @classmethod
    def _tier_names_are_plain(cls, value: dict[str, Tier]) -> dict[str, Tier]:
        for name in value:
            plain_name(name)
        return value

    @model_validator(mode="after")
    def _backend_names_are_unique(self) -> "Config":
        names = [name for name, _, _ in self.named_backends()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two backends are named {name!r}; give one of them another 'name'")
        return self

    @model_validator(mode="after")
    def _fallbacks_exist(self) -> "Config":
        for name, tier in self.tiers.items():
            for other in (*tier.fallbacks, *tier.context_window_fallbacks, *tier.content_policy_fallbacks):
                if other == name or other not in self.tiers:
                    raise ValueError(f"tier {name!r} falls back to {other!r}; name another tier of this file")
        return self

    @model_validator(mode="after")
    def _routing_names_tiers(self) -> "Config":
        if self.routing is not None:
            tiers = self.tiers.items()
            self.routing.names_tiers(
                {name: {able for one in tier.backends for able in one.capabilities} for name, tier in tiers}
            )
            for _, _, one in self.named_backends():
                if self.routing.name in (one.public_names if isinstance(one, LocalBackend) else one.models):
                    raise ValueError(f"routing.name {self.routing.name!r} is the name of a model; rename one of them")
        return self

    def named_backends(self) -> Iterator[tuple[str, str, LocalBackend | RemoteBackend]]:
        """(backend name, tier name, backend) of each backend, in the order of the file."""
        for tier_name, tier in self.tiers.items():
            for number, backend in enumerate(tier.backends, start=1):
                default = tier_name if number == 1 else f"{tier_name}-{number}"
                yield backend.name or default, tier_name, backend


def load(path: Path) -> Config:
    """Reads and checks a configuration file.

    Raises:
        ConfigurationError: One line `file:line: field: problem; remedy` for each thing that is wrong.
    """
    return check(yaml_file.read(path))


def check(file: yaml_file.YamlFile) -> Config:
    """Checks a file that was read; raises like `load`."""
    file.refuse_repeated()
    try:
        return Config.model_validate(file.value)
    except ValidationError as error:
        problems = [problem for details in error.errors() for problem in explain(details, file)]
        raise ConfigurationError("\n".join(dict.fromkeys(problems))) from None
