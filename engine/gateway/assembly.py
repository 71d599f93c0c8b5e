"""Puts the gateway together from a worker's document: which stages a request goes through, and in which order."""

from tokenmill.engine.gateway.app import Gateway, Service
from tokenmill.engine.gateway.governance.identify import Identify, Identities
from tokenmill.engine.gateway.governance.reserve import Reserve
from tokenmill.engine.gateway.governance.service import Governance
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
    governance = None if document.governance is None else Governance(document.governance)
    identities = None if governance is None else Identities(governance)
    if governance is not None and identities is not None:
        services.append(governance)
        stages.append(Identify(identities, document.settings.default_model))
    # Who asks comes first, then what the request may see, then where it may go; money is reserved for the dearest
    # of the routes that are left, below the router and above everything that may ask a backend twice.
    stages.append(ResolveModel(portfolio))
    if governance is not None:
        stages.append(Reserve(governance, portfolio))
    return Gateway(portfolio, stages, services, identify=None if identities is None else identities.of)
