"""The configuration of `tokenmill serve`: one typed file that names tiers and the servers behind each.

`docs/configuration.md` is made from the descriptions below by `tokenmill.engine.gateway.config_reference`.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from tokenmill.engine.gateway import yaml_file
from tokenmill.engine.gateway.backends import Capability
from tokenmill.engine.gateway.config_problems import explain, shown
from tokenmill.engine.gateway.defaults import LENGTHS, NEVER
from tokenmill.engine.gateway.governance.section import Governance
from tokenmill.engine.gateway.observability.section import Observability
from tokenmill.engine.gateway.router.section import Routing
from tokenmill.engine.gateway.sections import Section
from tokenmill.engine.gateway.sensitivity.section import Sensitivity
from tokenmill.errors import ConfigurationError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: What a browser's `Origin` header says of a page: no default port, no path.
_ORIGIN = re.compile(r"(?!http://[^/]*:80$|https://[^/]*:443$)[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")
#: What may stand in a header as a key.
_KEY = r"^[\x21-\x7e]+$"
#: vLLM flags that `tokenmill serve` sets itself, and what to use instead.
RESERVED_FLAGS: dict[str, str] = {
    "model": "name the model in 'model'",
    "served-model-name": "list the names in 'served_as'",
    "host": "set 'server.host'; an engine listens on 127.0.0.1 behind it",
    "port": "set 'server.port'; an engine gets a free port behind it",
    "uds": "set 'server.host' and 'server.port'; an engine gets a free port behind them",
    "ssl-keyfile": "let a reverse proxy in front end TLS",
    "ssl-certfile": "let a reverse proxy in front end TLS",
    "ssl-ca-certs": "let a reverse proxy in front end TLS",
    "grpc": "serve over HTTP",
}

#: Longest name of a model; a request that asks for a longer one gets 404.
_LONGEST_NAME = 1024


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
        return value if value is None else _model_name(value)

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


class Speculation(Section):
    """Draft several tokens cheaply and let the model check them in one step; the output stays the model's own."""

    method: Literal["draft_model", "ngram"] = Field(
        description="`draft_model`: a small model with the same tokenizer drafts; "
        "`ngram`: repeated text is looked up in the request itself, which costs nothing."
    )
    model: str | None = Field(None, description="The draft model: folder, hub name or `bundled:draft`.", min_length=1)
    tokens: int = Field(3, description="Most tokens drafted per step.", ge=1, le=64)

    @model_validator(mode="after")
    def _model_fits_method(self) -> "Speculation":
        if self.method == "draft_model" and self.model is None:
            raise ValueError("method draft_model needs 'model'; name the draft model or use method ngram")
        if self.method == "ngram" and self.model is not None:
            raise ValueError(f"method ngram drafts without a model; remove 'model: {self.model}' or use draft_model")
        return self


class Price(Section):
    """What tokens cost, in dollars per million. Own hardware has a price, too: what an hour costs by what it makes."""

    input: float = Field(0.0, description="Prompt tokens.", ge=0, le=1_000_000)
    cached: float | None = Field(
        None, description="Prompt tokens that the backend had cached; default: like `input`.", ge=0, le=1_000_000
    )
    output: float = Field(0.0, description="Generated tokens.", ge=0, le=1_000_000)


class Backend(Section):
    """What both kinds of backend have in common."""

    name: str | None = Field(
        None, description="Name in logs and metrics; default: the tier's name, with a number from the second on."
    )
    weight: float = Field(1.0, description="Share of the tier's load, relative to its other backends.", gt=0)
    max_concurrency: int | None = Field(
        None,
        description="Requests it may have open at once; more go to others or get 429. Each worker has an equal part of "
        "it, at least 1: below the number of workers it is that number.",
        ge=1,
    )
    requests_per_minute: int | None = Field(
        None,
        description="Requests it may be sent in any minute; more go to others or get 429. Shared like "
        "`max_concurrency`.",
        ge=1,
        le=10**9,
    )
    tokens_per_minute: int | None = Field(
        None,
        description="Tokens, prompt and answer, after which it gets no request until the minute is over. Shared like "
        "`max_concurrency`.",
        ge=1,
        le=10**12,
    )
    canary: float | None = Field(
        None,
        description="Share of the tier's requests, 0 to 1, that go here, and no more: not those that the others have "
        "no room for. While all others are down, all.",
        ge=0,
        le=1,
    )
    zone: Literal["on-premises", "edge", "cloud"] = Field("on-premises", description="Where it stands, for policies.")
    region: str | None = Field(None, description="Free text, e.g. `eu-central`.")
    version: str | None = Field(None, description="Version of the model, free text; an answer's `x-tokenmill-version`.")
    price: Price = Field(default_factory=Price, description="What its tokens cost.")
    context_window: int | None = Field(
        None, description="Most tokens of a prompt and its answer together; longer requests are not routed here.", ge=1
    )
    max_output_tokens: int | None = Field(
        None, description="Most tokens of one answer: what budgets reserve for a request without `max_tokens`.", ge=1
    )
    capabilities: list[Capability] = Field(
        default_factory=list, description="What it can do beyond text in, text out; requests that need more avoid it."
    )
    prefix_cache: Literal["organisation", "team", "app", "key"] | None = Field(
        None,
        description="Whose requests share the prompts in vLLM's prefix cache, e.g. those of one `team`; default: all. "
        "Who shares it can tell by the time to the first token what others have asked. With `governance`; sends "
        "`cache_salt`, which servers other than vLLM may refuse.",
    )

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str | None) -> str | None:
        return value if value is None else _plain_name(value)


class LocalBackend(Backend):
    """A vLLM server that `tokenmill serve` starts, watches and restarts."""

    hinted_fields = ("url",)

    model: str = Field(
        description="What vLLM loads: a folder, a hub name, or `bundled:target`, which comes with Tokenmill.",
        min_length=1,
    )
    served_as: list[str] | None = Field(
        None, description="Public model names; default: the last part of `model`.", min_length=1
    )
    speculation: Speculation | None = Field(None, description="How to draft tokens; default: not at all.")
    flags: dict[str, Any] = Field(
        default_factory=dict,
        description="Any flag of `vllm serve`, without the dashes: text or number, `true` for `--flag`, `false` for "
        "`--no-flag`, a list for several values, a mapping for JSON.",
    )
    env: dict[str, Any] = Field(
        default_factory=dict, description="Environment variables of this server, e.g. `CUDA_VISIBLE_DEVICES`."
    )

    @field_validator("served_as")
    @classmethod
    def _names_can_be_served(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name.startswith("-"):
                raise ValueError(f"{name!r} would be an option of vLLM's; begin the name with another character")
            _model_name(name)
        return value

    @field_validator("flags")
    @classmethod
    def _flags_are_for_vllm(cls, value: dict[str, Any]) -> dict[str, Any]:
        named = {name.lstrip("-").replace("_", "-"): setting for name, setting in value.items()}
        for name, setting in named.items():
            if setting is None:
                raise ValueError(f"flag {name!r} has no value; write true for --{name}, or a value")
            if name in RESERVED_FLAGS:
                raise ValueError(f"flag {name!r} is set by tokenmill serve; {RESERVED_FLAGS[name]}")
            if name == "headless":
                raise ValueError("headless servers take no requests; run `tokenmill serve MODEL --headless` instead")
        return named

    @field_validator("env")
    @classmethod
    def _env_is_text(cls, value: dict[str, Any]) -> dict[str, str]:
        for name, setting in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
            if isinstance(setting, bool) or not isinstance(setting, (str, int, float)) or "\0" in str(setting):
                raise ValueError(f"{name} is {shown(setting)}, not text or a number; put it in quotes")
        return {name: str(setting) for name, setting in value.items()}

    @model_validator(mode="after")
    def _one_way_to_speculate(self) -> "LocalBackend":
        if self.speculation is not None and "speculative-config" in self.flags:
            raise ValueError("both 'speculation' and the flag 'speculative-config' are set; keep one")
        return self

    @property
    def public_names(self) -> list[str]:
        """The model names that clients use."""
        if self.served_as is not None:
            return self.served_as
        if self.model.startswith("bundled:"):
            return ["tiny-" + self.model.removeprefix("bundled:")]
        return [Path(self.model).name or self.model]


class RemoteBackend(Backend):
    """A server that runs elsewhere and speaks the OpenAI or the Anthropic protocol."""

    url: str = Field(
        description="`http(s)://host[:port][/prefix]`, with or without a final `/v1`; a prefix that names another "
        "version, like `/v1beta/openai`, is taken as it is."
    )
    below_v1: bool = Field(
        True, description="`false`: its paths follow `url` without `/v1`, e.g. `/inference/chat/completions`."
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Public model name to the server's own name for it; default: what its `/v1/models` lists.",
    )
    info: dict[str, Any] = Field(
        default_factory=dict,
        description="What else `/model/info` tells of its models, e.g. `{description: fast, supports_pdf: true}`.",
    )
    drop_unknown: bool = Field(
        False,
        description="Of `anthropic`: fields of chat completions that its API has no counterpart of are left out, but "
        "for `functions`; default: refused with 400, or sent to another backend that knows them.",
    )
    read_timeout_seconds: float | None = Field(
        None, description="Its own `read_timeout_seconds`; default: the server's.", gt=0, le=86_400
    )
    defaults: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields that chat completions get which lack them, e.g. `{temperature: 0.2, max_tokens: 4096}`.",
    )
    prefix: str = Field(
        "",
        description="What the public names of the models that it lists begin with, e.g. `openai/`; not with `models`.",
        max_length=200,
    )
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds its API key; default: the client's `Authorization` is passed on.",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    api_key: str | None = Field(
        None,
        description="Its API key itself; better kept in a variable that `api_key_env` names.",
        pattern=_KEY,
        repr=False,
    )
    protocol: Literal["openai", "anthropic"] = Field("openai", description="What it speaks.")
    health_path: str | None = Field(
        "/health", description="Path of its health probe; `null` judges it by its answers alone.", pattern=r"^/[!-~]*$"
    )

    @field_validator("models")
    @classmethod
    def _names_can_be_asked_for(cls, value: dict[str, str]) -> dict[str, str]:
        for public, own in value.items():
            _model_name(public)
            _model_name(own)
        return value

    @field_validator("url")
    @classmethod
    def _url_is_http(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
        except ValueError:
            raise ValueError("the URL is not http(s)://host[:port][/prefix]") from None
        if parts.username is not None or parts.password is not None:
            # First: other errors show the whole address.
            raise ValueError("the URL holds a password; put the key into a variable and name it in 'api_key_env'")
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
        except ValueError:
            usable = False
        strange = re.search(r"[\s\x00-\x1f\x7f\\]", value) or not parts.path.isascii() if usable else False
        if not usable or strange or parts.query or parts.fragment:
            raise ValueError(f"{value!r} is not http(s)://host[:port][/prefix]")
        return value

    @field_validator("defaults")
    @classmethod
    def _defaults_decide_nothing(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, default in value.items():
            if name.casefold() in NEVER:
                raise ValueError(f"{name[:40]!r} is for clients to say; leave it out")
            if name in LENGTHS and (type(default) is not int or default < 1):
                raise ValueError(f"{name!r} is {shown(default)}, not a number of tokens above 0")
        return value

    @model_validator(mode="after")
    def _prefix_is_of_what_it_lists(self) -> "RemoteBackend":
        if self.prefix and self.models:
            raise ValueError("'prefix' is for models that the server lists, and 'models' names them; keep one")
        return self

    @model_validator(mode="after")
    def _one_key(self) -> "RemoteBackend":
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("'api_key' and 'api_key_env' both give the key; keep one, best 'api_key_env'")
        return self

    def secret(self) -> str | None:
        """The API key, from the file or the environment; None when none is configured.

        Raises:
            ConfigurationError: The variable is not set.
        """
        if self.api_key_env is None:
            return self.api_key
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigurationError(f"{self.api_key_env} is not set; export it, the backend at {self.url} needs it")
        if not re.fullmatch(_KEY, key):
            raise ConfigurationError(f"{self.api_key_env} holds characters that are in no key; export the key alone")
        return key


def _kind(value: Any) -> str:
    """A backend with a `url` is remote, any other is ours."""
    fields = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return "remote" if "url" in fields else "local"


AnyBackend = Annotated[
    Annotated[LocalBackend, Tag("local")] | Annotated[RemoteBackend, Tag("remote")], Discriminator(_kind)
]


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
        None, description="How requests for `auto` are routed, and which zones are asked first; default: not at all."
    )
    sensitivity: Sensitivity | None = Field(
        None, description="Where requests with personal or secret data may go; default: anywhere."
    )

    @field_validator("tiers")
    @classmethod
    def _tier_names_are_plain(cls, value: dict[str, Tier]) -> dict[str, Tier]:
        for name in value:
            _plain_name(name)
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
    try:
        return Config.model_validate(file.value)
    except ValidationError as error:
        problems = [problem for details in error.errors() for problem in explain(details, file)]
        raise ConfigurationError("\n".join(dict.fromkeys(problems))) from None


def _model_name(value: str) -> str:
    if not value or value != value.strip() or not value.isprintable() or len(value) > _LONGEST_NAME:
        found = repr(value if len(value) <= 80 else value[:80] + "...")
        rule = f"write 1 to {_LONGEST_NAME} printable characters without blanks around them"
        raise ValueError(f"{found} is no model's name; {rule}")
    return value


def _plain_name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(
            f"{value[:80]!r} is no name; use letters, digits, '.', '_' and '-', at most 63, a letter or digit first"
        )
    return value
