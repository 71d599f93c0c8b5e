"""Puts the gateway together from a worker's document: which stages a request goes through, and in which order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenmill.engine.gateway.admin.canaries import Canaries
from tokenmill.engine.gateway.admin.rollup import Rollup
from tokenmill.engine.gateway.admin.site import PREFIXES, AdminSite
from tokenmill.engine.gateway.app import Application, Gateway, Service
from tokenmill.engine.gateway.dashboard.figures import Sources
from tokenmill.engine.gateway.dashboard.site import PREFIX as DASHBOARD
from tokenmill.engine.gateway.dashboard.site import DashboardSite
from tokenmill.engine.gateway.governance import audit
from tokenmill.engine.gateway.governance.identify import Identify, Identities
from tokenmill.engine.gateway.governance.reserve import Reserve
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.kept import Kept
from tokenmill.engine.gateway.metrics import Metrics
from tokenmill.engine.gateway.observability.engines import Engines
from tokenmill.engine.gateway.observability.request_log import RequestLog
from tokenmill.engine.gateway.observability.traces import Traces
from tokenmill.engine.gateway.pipeline import Stage
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.register import Register
from tokenmill.engine.gateway.router.escalation import Escalation
from tokenmill.engine.gateway.router.outcomes import OutcomeLog
from tokenmill.engine.gateway.router.stage import Router
from tokenmill.engine.gateway.routing import ResolveModel
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.sensitivity.stages import Audit, Guard, Residency, Sensitivity, log_decision
from tokenmill.engine.gateway.settings import Document
from tokenmill.engine.gateway.upstream import Upstream


def create_app(document: Document) -> Gateway:
    """The gateway with all of its stages.

    Args:
        document: Backends and settings.
    """
    portfolio = Portfolio(document.backends, document.settings)
    stages: list[Stage] = []
    services: list[Service] = []
    sites: dict[str, Application] = {}
    observed = document.observability

    def upstream() -> Upstream:
        return gateway.upstream()  # made last; nobody asks before it runs

    servers = Engines(portfolio, upstream)
    counted = Metrics(portfolio, observed, servers)
    watchers: list[RequestLog | Traces] = []
    if observed.request_log:
        watchers.append(RequestLog(observed.log_bodies))
    if observed.traces is not None:
        watchers.append(Traces(observed.traces, observed.trace_share))
    stages += watchers
    services += watchers
    governance = None if document.governance is None else Governance(document.governance)
    identities = None if governance is None else Identities(governance)
    if governance is not None and identities is not None:
        services += [governance, Canaries(portfolio, governance), Rollup(governance)]
        sites |= dict.fromkeys(PREFIXES, AdminSite(governance, portfolio, counted))
        sites[DASHBOARD] = DashboardSite(Sources(governance, counted, servers))
        stages.append(Identify(identities, document.settings.default_model))
    tell = log_decision if governance is None else _audit_trail(governance)
    sensitivity, routing = document.sensitivity, document.routing
    elsewhere = any(backend.zone not in SensitivitySettings().trusted_zones for backend in document.backends)
    if sensitivity is None and (governance is not None or elsewhere):
        # A key's metadata, or the client itself, may confine requests, also where nothing is searched.
        sensitivity = SensitivitySettings(default="allow", unreadable="allow")
    # Who asks comes first, then what the request may see, then where it may go; money is reserved for the dearest
    # of the routes that are left, below the router and above everything that may ask a backend twice.
    if sensitivity is not None:
        stages.append(Sensitivity(sensitivity, tell))
    if routing is None:
        stages.append(ResolveModel(portfolio))
    else:
        portfolio.virtual = (routing.name,)
        outcomes = None if routing.log is None else OutcomeLog(Path(routing.log))
        services += [] if outcomes is None else [outcomes]
        stages.append(Router(portfolio, routing, outcomes, tell))
    if sensitivity is not None:
        stages.append(Residency(sensitivity, tell))
    if governance is not None:
        stages.append(Reserve(governance))
    if routing is not None and routing.escalation is not None:
        stages.append(Escalation(routing.escalation))
    if sensitivity is not None:
        stages.append(Guard(tell))
    identify = None if identities is None else identities.of
    register = None if governance is None or _is_file(governance.options.store) else Register(governance)
    kept = Kept(_kept_in(document), register)
    gateway = Gateway(portfolio, stages, services, sites, identify, counted, kept, watchers)
    return gateway


def _kept_in(document: Document) -> Path | None:
    """The file in which it stands who keeps which response; with keys it outlives the gateway, as the books do."""
    governance, shared = document.governance, document.observability.shared
    if governance is not None and _is_file(governance.store):
        return Path(f"{governance.store}-responses")
    return Path(shared) / "responses.kept" if shared else None


def _is_file(store: str) -> bool:
    """Whether a store is one machine's own."""
    return "://" not in store


def _audit_trail(governance: Governance) -> Audit:
    """Has decisions of policies written into the audit trail, off the request's path."""

    def tell(action: str, subject: str, details: Mapping[str, Any]) -> None:
        entry = audit.Entry("gateway", action, subject, dict(details))
        governance.store.post_item(audit.extend, entry, dispensable=True, beside=True)

    return tell
