"""Puts the gateway together from a worker's document: which stages a request goes through, and in which order."""

from tokenmill.engine.gateway.admin.canaries import Canaries
from tokenmill.engine.gateway.admin.site import PREFIXES, AdminSite
from tokenmill.engine.gateway.app import Application, Gateway, Service
from tokenmill.engine.gateway.governance.identify import Identify, Identities
from tokenmill.engine.gateway.governance.reserve import Reserve
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.metrics import Metrics
from tokenmill.engine.gateway.observability.request_log import RequestLog
from tokenmill.engine.gateway.observability.traces import Traces
from tokenmill.engine.gateway.pipeline import Stage
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.routing import ResolveModel
from tokenmill.engine.gateway.settings import Document


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
        services += [governance, Canaries(portfolio, governance)]
        sites |= dict.fromkeys(PREFIXES, AdminSite(governance, portfolio))
        stages.append(Identify(identities, document.settings.default_model))
    # Who asks comes first, then what the request may see, then where it may go; money is reserved for the dearest
    # of the routes that are left, below the router and above everything that may ask a backend twice.
    stages.append(ResolveModel(portfolio))
    if governance is not None:
        stages.append(Reserve(governance, portfolio))
    return Gateway(
        portfolio,
        stages,
        services,
        sites,
        identify=None if identities is None else identities.of,
        counted=Metrics(portfolio, observed),
    )
