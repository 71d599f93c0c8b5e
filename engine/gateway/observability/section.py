"""The configuration's `observability` section."""

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tokenmill.engine.gateway.observability.options import Options
from tokenmill.engine.gateway.sections import Section


class Observability(Section):
    """What the gateway tells about its work besides `/metrics`."""

    request_log: bool = Field(
        False,
        description="One line of JSON for each request whose body could be read, in the log file of the worker that "
        "had it (the panel names the folder; three files of 10 MB are kept): who, what, where, how long, how much.",
    )
    log_bodies: bool = Field(
        False, description="Put request bodies, with the prompts in them, into `request_log`. Mind your policies."
    )
    traces: str | None = Field(
        None,
        description="Address of an OpenTelemetry collector that takes OTLP over HTTP, e.g. "
        "`http://127.0.0.1:4318/v1/traces`; needs the extra `tokenmill[otel]`.",
    )
    trace_share: float = Field(
        1.0, description="Share of the requests without a `traceparent` of their own that are traced.", ge=0, le=1
    )
    open_metrics: bool | None = Field(
        None,
        description="Whether `/metrics` answers everybody; it names teams, apps and their cost. Default: only without "
        "`governance`. `/admin/metrics` always wants a key with a role.",
    )
    accounts: int = Field(
        50,
        description="Most teams, and apps, that metrics name, of all workers together; those met later are counted as "
        "`other`.",
        ge=0,
        le=1000,
    )

    @field_validator("traces")
    @classmethod
    def _traces_go_over_http(cls, value: str | None) -> str | None:
        try:
            parts = urlsplit(value or "http://unset")
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable or parts.username is not None or re.search(r"\s", value or ""):
            # What stands before an @ may be a password.
            said = "what stands there, with an @," if "@" in (value or "") else repr(value)
            raise ValueError(f"{said} is not http(s)://host[:port]/path without a user and a password")
        return value

    def options(self, keys: bool) -> Options:
        """What the gateway processes are told.

        Args:
            keys: Requests need one: metrics tell who asks then.
        """
        opened = not keys if self.open_metrics is None else self.open_metrics
        return Options(self.request_log, self.log_bodies, self.traces, self.trace_share, opened, self.accounts)
