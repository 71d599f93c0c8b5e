"""The servers behind the gateway, in the configuration: local vLLM servers and any others."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from tokenmill.engine.gateway.backends import Capability
from tokenmill.engine.gateway.config_problems import shown
from tokenmill.engine.gateway.defaults import LENGTHS, NEVER
from tokenmill.engine.gateway.sections import Section
from tokenmill.engine.gateway.settings import MOST_OF_A_NAME
from tokenmill.errors import ConfigurationError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: What may stand in a header as a key.
_KEY = r"^[\x21-\x7e]+$"
#: Anthropic's prices of what is written into its cache, for minutes and for an hour, over that of other prompt tokens.
_WRITING = (1.25, 2.0)
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
    written: float | None = Field(
        None,
        description="Prompt tokens that the backend wrote into its cache; default: like `input`, with "
        "`protocol: anthropic` 1.25 times that.",
        ge=0,
        le=1_000_000,
    )
    written_hour: float | None = Field(
        None,
        description="Those of them that it keeps for an hour; default: like `written`, with `protocol: anthropic` "
        "twice `input`.",
        ge=0,
        le=1_000_000,
    )
    output: float = Field(0.0, description="Generated tokens.", ge=0, le=1_000_000)

    def writing(self, protocol: str) -> tuple[float | None, float | None]:
        """`written` and `written_hour` with what is usual where a protocol is spoken; None: nothing special."""
        if protocol != "anthropic":
            return self.written, self.written_hour
        minutes, hour = [self.input * factor for factor in _WRITING]
        return (
            minutes if self.written is None else self.written,
            hour if self.written_hour is None else self.written_hour,
        )


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
        return value if value is None else plain_name(value)


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
            model_name(name)
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
            model_name(public)
            model_name(own)
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


def model_name(value: str) -> str:
    """What may be a model's name; raises `ValueError`."""
    if not value or value != value.strip() or not value.isprintable() or len(value) > MOST_OF_A_NAME:
        found = repr(value if len(value) <= 80 else value[:80] + "...")
        rule = f"write 1 to {MOST_OF_A_NAME} printable characters without blanks around them"
        raise ValueError(f"{found} is no model's name; {rule}")
    return value


def plain_name(value: str) -> str:
    """What may be the name of a tier or a backend; raises `ValueError`."""
    if not NAME.fullmatch(value):
        raise ValueError(
            f"{value[:80]!r} is no name; use letters, digits, '.', '_' and '-', at most 63, a letter or digit first"
        )
    return value
