"""What a LiteLLM proxy's file says about logs, figures and traces, as our `observability` section."""

from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from tokenmill.engine.gateway.foreign_file import ForeignFile, shown
from tokenmill.engine.gateway.litellm_reasons import PRESIDIO
from tokenmill.engine.gateway.observability.section import Observability
from tokenmill.engine.gateway.yaml_file import Place

_CALLBACKS = ("callbacks", "success_callback", "failure_callback", "service_callback")
_OPENED: Place = ("litellm_settings", "require_auth_for_metrics_endpoint")
#: Where LiteLLM reads the collector's address, the first that is set.
_ENDPOINTS = ("OTEL_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORTERS = ("OTEL_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PATH = "/v1/traces"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
#: OTLP over gRPC is spoken there, whatever the address begins with.
_GRPC_PORT = ":4317"


def section(source: ForeignFile, governed: bool) -> dict[str, Any]:
    """The section; empty where the file says nothing that would be in it.

    Args:
        source: The file; its variables are known.
        governed: There is a master key.
    """
    found: dict[str, Any] = {"request_log": True} if source.flag(("litellm_settings", "json_logs")) else {}
    if source.peek(_OPENED) is not None and not source.flag(_OPENED):
        found["open_metrics"] = True
    for field in _CALLBACKS:
        place: Place = ("litellm_settings", field)
        inside = isinstance(source.peek(place), list)
        for at in [(*place, index) for index in source.keys(place)] if inside else [place]:
            name = source.peek(at)
            if name == "prometheus":
                source.raw(at)
                if governed and "open_metrics" not in found and source.peek(_OPENED) is None:
                    source.leave(
                        at,
                        "/metrics is closed where there is a master_key; ask /admin/metrics with it, or open it with "
                        "`require_auth_for_metrics_endpoint: false`",
                    )
            elif name in ("otel", "opentelemetry"):
                found |= _traces(source, at)
            elif name == "presidio":
                source.leave(at, PRESIDIO)
            elif name is not None:
                source.leave(
                    at,
                    f"{shown(name)} is not called, and checks nothing; there are `prometheus`, `otel` and `json_logs`",
                )
    return found


def _traces(source: ForeignFile, place: Place) -> dict[str, Any]:
    """Where traces go by LiteLLM's variables; listed where they cannot go there."""
    variable = next((name for name in _ENDPOINTS if source.lookup(name)), _ENDPOINTS[1])
    address = source.lookup(variable)
    exporter = next((one for name in _EXPORTERS if (one := source.lookup(name))), "")
    source.raw(place)
    if address is None or not address.startswith(("http://", "https://")):
        source.leave(place, f"set {variable} to http(s)://host:port of a collector that takes OTLP over HTTP")
    elif "grpc" in exporter or _GRPC_PORT in address:
        source.leave(place, "traces go out over HTTP, not gRPC; name the collector's other port, mostly 4318")
    elif not exporter_is_installed():
        source.leave(place, "install the extra tokenmill[otel]")
    elif not _is_usable(address):  # not shown: it may hold a password
        source.leave(place, f"{variable} is no http(s)://host:port[/path] without a user, a password and a query")
    else:
        address = address.rstrip("/")
        return {"traces": address if address.endswith(_PATH) else address + _PATH}
    return {}


def _is_usable(address: str) -> bool:
    try:
        Observability(traces=address)
    except ValidationError:
        return False
    parts = urlsplit(address)
    return not parts.query and not parts.fragment


def exporter_is_installed() -> bool:
    """Whether traces can be sent: the API alone comes with other packages, too."""
    try:
        return find_spec("opentelemetry.sdk") is not None and find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
