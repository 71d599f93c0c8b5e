"""The stages that keep data where it may be.

`Sensitivity` stands above the router: it searches the request and notes its clearance. `Residency` stands below it: it
takes the backends that may not see the request out of the routes, puts placeholders in, and takes them out of the
answer again. A stage that changes the body stands below it: what is added above has not been searched. `Guard` stands
directly above the forwarder, under everything that may ask a second time or elsewhere: it narrows the routes once more,
so that no fallback, retry, escalation or burst can walk around the policy.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.heads import without
from tokenmill.engine.gateway.hints import strip
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.sensitivity.clearance import NOTE, Clearance
from tokenmill.engine.gateway.sensitivity.detector import Detector
from tokenmill.engine.gateway.sensitivity.redaction import Redaction
from tokenmill.engine.gateway.sensitivity.restoring import restore
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings

log = logging.getLogger("tokenmill.gateway")

#: A path that holds nothing but names; any other may hold the data itself.
_WORDS_ALONE = re.compile(r"(?:/v[0-9])?(?:/[a-z_]{1,32}){1,4}")

#: (action, subject, details): what is told about each decision of the policy; details hold nothing of the data.
Audit = Callable[[str, str, Mapping[str, Any]], None]


def log_decision(action: str, subject: str, details: Mapping[str, Any]) -> None:
    """The audit trail where governance keeps none: a line in the log."""
    log.info("%s %s %s", action, subject, orjson.dumps(dict(details)).decode())


class Sensitivity:
    """Searches a request before it is known where it goes.

    Args:
        settings: The policy.
        audit: Told about every request in which something was found or whose key confines it.
    """

    name = NOTE

    def __init__(self, settings: SensitivitySettings, audit: Audit = log_decision) -> None:
        self._detector = Detector(settings)
        self._audit = audit

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """See `pipeline.Stage`; refuses with 403 what the policy refuses."""
        if self._detector.searches:
            return self._search(exchange, proceed)
        return self._go_on(exchange, proceed, self._detector.unsearched(exchange))

    async def _search(self, exchange: Exchange, proceed: Handler) -> Reply:
        return await self._go_on(exchange, proceed, await self._detector.clear(exchange))

    def _go_on(self, exchange: Exchange, proceed: Handler, found: Clearance) -> Awaitable[Reply]:
        strip(exchange)
        headers = self._detector.headers(exchange)
        clearance = confined(replace(found, headers=headers) if headers else found, exchange.principal)
        exchange.notes[NOTE] = clearance
        if clearance.action != "allow" or clearance.kinds:
            self._audit(f"sensitivity.{clearance.action}", subject_of(exchange), told(exchange, clearance))
        elif clearance.zones is not None or clearance.regions is not None:
            self._audit("sensitivity.confine", subject_of(exchange), told(exchange, clearance))
        if clearance.action == "refuse":
            raise ApiError(403, f"Not sent to any model: {clearance.why}.", code="sensitive_data")
        return proceed(exchange)


class Residency:
    """Keeps a request to the backends that may see it, and the data out of the others.

    Args:
        settings: The policy.
        audit: Told when no backend is left.
    """

    name = "residency"

    def __init__(self, settings: SensitivitySettings, audit: Audit = log_decision) -> None:
        self._trusted = frozenset(settings.trusted_zones)
        self._audit = audit

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """See `pipeline.Stage`."""
        clearance: Clearance = exchange.notes[NOTE]
        _narrow(exchange, clearance, self._audit)
        redaction, hidden = clearance.redaction, clearance.hidden
        nothing_to_hide = redaction is None or hidden is None
        if (nothing_to_hide and not clearance.headers) or self._all_trusted(exchange):
            return proceed(exchange)
        exchange.forward = without(exchange.forward, clearance.headers)
        if redaction is None or hidden is None:
            return proceed(exchange)
        exchange.body, exchange.payload = hidden, hidden.raw
        return self._hide(exchange, proceed, redaction, hidden)

    async def _hide(self, exchange: Exchange, proceed: Handler, redaction: Redaction, hidden: Body) -> Reply:
        reply = await proceed(exchange)
        restore(reply, redaction, hidden)
        return reply

    def _all_trusted(self, exchange: Exchange) -> bool:
        return all(target.backend.zone in self._trusted for route in exchange.routes for target in route.targets)


class Guard:
    """The last stage: nothing below it is outside of the clearance, whatever stages above did to the routes.

    Args:
        audit: Told when no backend is left.
    """

    name = "guard"

    def __init__(self, audit: Audit = log_decision) -> None:
        self._audit = audit

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """See `pipeline.Stage`."""
        _narrow(exchange, exchange.notes[NOTE], self._audit)
        return proceed(exchange)


def confined(clearance: Clearance, principal: Principal | None) -> Clearance:
    """The clearance within the `zones` and `regions` that a key's metadata confines it to."""
    said = principal.metadata if principal else {}
    if "zones" not in said and "regions" not in said:
        return clearance
    zones, regions = _names(said.get("zones")), _names(said.get("regions"))
    if zones is None and regions is None:
        return clearance
    if zones is not None and clearance.zones is not None:
        zones &= clearance.zones
    why = clearance.why if clearance.zones is not None else "its key is confined"
    return replace(clearance, zones=clearance.zones if zones is None else zones, regions=regions, why=why)


def _names(value: Any) -> frozenset[str] | None:
    """A list of names from metadata, or one name; a value of any other kind admits nothing."""
    if value is None or isinstance(value, str):
        return None if value is None else frozenset({value})
    return frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else frozenset()


def _narrow(exchange: Exchange, clearance: Clearance, audit: Audit) -> None:
    """Takes out the backends that may not see the request; raises 403 when none is left."""
    if clearance.zones is None and clearance.regions is None:
        return
    narrowed = clearance.narrow(exchange.routes)
    if not narrowed and exchange.routes:
        zones = ", ".join(sorted({target.backend.zone for route in exchange.routes for target in route.targets}))
        audit("residency.refuse", subject_of(exchange), {**told(exchange, clearance), "offered": zones})
        raise refusal(clearance, zones)
    exchange.routes = narrowed


def refusal(clearance: Clearance, offered: str) -> ApiError:
    """403: those that could serve the request may not see it; says why.

    Args:
        clearance: The request's.
        offered: The zones in which it could be served.
    """
    may = [*sorted(clearance.zones or ()), *sorted(f"region {region}" for region in clearance.regions or ())]
    return ApiError(
        403,
        f"No backend that may see this request can serve it: {clearance.why}, so it stays in "
        f"{' and '.join(may) or 'no zone at all'}; it could be served in {offered}.",
        code="residency",
    )


def subject_of(exchange: Exchange) -> str:
    """Whose request it is, for the audit trail: the key, and the request's id."""
    key = exchange.principal.key if exchange.principal else "anonymous"
    return f"{key} {exchange.request_id}"


def told(exchange: Exchange, clearance: Clearance) -> dict[str, Any]:
    """The details of a decision, for the audit trail."""
    endpoint = exchange.endpoint if _WORDS_ALONE.fullmatch(exchange.endpoint) else "other"
    return {"model": exchange.model, "endpoint": endpoint, **clearance.described()}
