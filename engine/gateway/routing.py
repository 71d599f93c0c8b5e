"""The stage that turns a request's model into the routes it may take; policies below narrow them."""

from collections.abc import Awaitable

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.fallback import fitting
from tokenmill.engine.gateway.openapi import DRY_RUN
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.portfolio import Portfolio


class ResolveModel:
    """Looks the model up in the portfolio."""

    name = "resolve"

    def __init__(self, portfolio: Portfolio) -> None:
        self._portfolio = portfolio

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """See `pipeline.Stage`."""
        if exchange.endpoint == DRY_RUN:
            message = f"Nothing is routed here: the configuration has no section `routing` for {DRY_RUN} to explain."
            raise ApiError(404, message, code="not_found")
        exchange.routes = fitting(self._portfolio.routes(exchange.model, exchange.principal), exchange)
        return proceed(exchange)
