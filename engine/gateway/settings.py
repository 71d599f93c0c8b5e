"""The gateway's own settings and the document a worker process is started with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import orjson

from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance.options import Options
from tokenmill.engine.gateway.observability.options import Options as ObservabilityOptions
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.errors import ConfigurationError

#: No model has a longer name, and no path is longer: both go into logs, traces and the audit trail.
MOST_OF_A_NAME = 1024


@dataclass(frozen=True)
class Settings:
    """Limits and times of one gateway process; seconds and bytes.

    Attributes:
        max_body_bytes: A longer request body is refused with 413.
        max_header_bytes: A longer request head is refused with 431.
        header_timeout_s: A connection that has not sent a whole request head after this long is closed.
        body_timeout_s: A request body that pauses for this long is refused with 408.
        body_bytes_per_s: So is one that has taken longer than `body_timeout_s` and comes at fewer bytes a second.
        stall_timeout_s: A client that takes nothing of its answer for this long is cut off.
        keep_alive_s: An idle client connection is closed after this long.
        connect_timeout_s: Time to connect to a backend.
        read_timeout_s: Longest silence of a backend, before and during its answer; then 504.
        drain_s: After SIGTERM, open requests may go on for this long.
        probe_interval_s: Time between two health probes of a backend.
        probe_timeout_s: Time for one probe.
        breaker_failures: Failures in a row that open the circuit of a backend and model.
        breaker_cooldown_s: How long it stays open the first time; doubles up to 16 times that.
        retry_ratio: Upstream requests that may be repeated, per request made: bounds retry storms.
        retry_after_s: What `Retry-After` says when no backend can serve and none said anything itself.
        most_retries: Most times one request is sent again within a tier; None: until every backend was asked.
        fallbacks: Tier to the tiers that take over, in this order, when none of its backends can serve, or does.
        context_window_fallbacks: Tier to those that take over from it when a prompt is too long for it.
        content_policy_fallbacks: Tier to those that take over when its backends refuse a request's content.
        workers: Gateway processes that share what a backend may be sent, at once and in a minute.
        default_model: What a request without `model` means. None: the sole tier's model, if there is one tier.
        allowed_origins: Origins of web pages that may use the API from a browser; `*`: all.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    header_timeout_s: float = 15.0
    body_timeout_s: float = 30.0
    body_bytes_per_s: int = 1024
    stall_timeout_s: float = 60.0
    keep_alive_s: float = 75.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 600.0
    drain_s: float = 30.0
    probe_interval_s: float = 1.0
    probe_timeout_s: float = 2.0
    breaker_failures: int = 5
    breaker_cooldown_s: float = 2.0
    retry_ratio: float = 0.1
    retry_after_s: int = 2
    most_retries: int | None = None
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    context_window_fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    content_policy_fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    workers: int = 1
    default_model: str | None = None
    allowed_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """Everything a worker process needs, handed to it as JSON on its standard input.

    Attributes:
        backends: The portfolio; at least one.
        settings: The gateway's settings.
        parent_pid: The process whose death ends the worker; None: whoever started it.
        governance: Who may ask for what; None: everybody for everything.
        observability: What to tell about the work.
        routing: How requests are routed that name no concrete model; None: they are not.
        sensitivity: Where requests with sensitive data may go; None: anywhere.
    """

    backends: tuple[Backend, ...]
    settings: Settings = field(default_factory=Settings)
    parent_pid: int | None = None
    governance: Options | None = None
    observability: ObservabilityOptions = field(default_factory=ObservabilityOptions)
    routing: RoutingSettings | None = None
    sensitivity: SensitivitySettings | None = None

    def to_json(self) -> bytes:
        """The document as the worker reads it. Holds API keys: pass it through a pipe, never on a command line."""
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, text: bytes) -> "Document":
        """Reads `to_json`'s text; raises `ConfigurationError` that names the field that is wrong."""
        try:
            document = msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"the gateway's document cannot be read: {error}") from None
        names = [backend.name for backend in document.backends]
        if not names:
            raise ConfigurationError("the gateway's document names no backend; give at least one")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigurationError(f"backend names must be unique; repeated: {', '.join(repeated)}")
        return document
