"""The gateway as an ASGI application.

A `Gateway` holds everything it needs itself: no globals, so several can live in one process. Requests to models go
through the pipeline (`pipeline.py`); the few other paths are answered here, or by the sites that are mounted.
`assembly.create_app` puts one together.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from tokenmill.engine.gateway import metrics, model_info, openapi, paths
from tokenmill.engine.gateway.api_error import JSON, ApiError, Headers, model_not_found
from tokenmill.engine.gateway.background import Background
from tokenmill.engine.gateway.cors import Cors
from tokenmill.engine.gateway.cross_site import CrossSite
from tokenmill.engine.gateway.forward import Forwarder
from tokenmill.engine.gateway.heads import first_values
from tokenmill.engine.gateway.health import Prober
from tokenmill.engine.gateway.kept import Kept
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Outcome, Reply, Stage, compose
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.request import (
    BREAK_OFF,
    ON_HANGUP,
    ClientGoneError,
    Fields,
    Receive,
    Scope,
    Send,
    exchange_of,
    read_body,
    request_id,
    with_model,
)
from tokenmill.engine.gateway.sending import error_reply, json_reply, send_stream, send_whole
from tokenmill.engine.gateway.stored import About, Stored, about
from tokenmill.engine.gateway.upstream import Upstream, forwarded_headers
from tokenmill.errors import TokenmillError

log = logging.getLogger("tokenmill.gateway")

Endpoint = Callable[[], Awaitable[Reply]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Inference paths outside /v1 that vLLM has too.
BARE_PATHS = frozenset({"/rerank", "/v2/rerank", "/score", "/pooling", "/classify", "/tokenize", "/detokenize"})
#: A body whose length has no more digits is read before it is known whose it is.
_SHORT_DIGITS = 5
#: What may stand in a path that is passed on: nothing that another server could read as another path.
_PASSED_PATH = re.compile(r"/v1(/[A-Za-z0-9_~:@-][A-Za-z0-9_.~:@-]*)+")
#: Paths by which whoever runs an engine changes it; they are none for its clients.
_OPERATORS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_MODEL_PREFIX = "/v1/models/"
#: What the known inference paths answer to another method than POST.
_POST_ONLY = frozenset({*BARE_PATHS, *(path for path in openapi.INFERENCE_PATHS)})


class Service(Protocol):
    """What runs beside the requests, from the server's start to its end."""

    async def start(self) -> None:
        """Begins; an exception keeps the server from starting."""
        ...

    async def stop(self) -> None:
        """Ends; the requests have ended before."""
        ...


class Gateway:
    """The application; call it with (scope, receive, send).

    Args:
        portfolio: The backends.
        stages: What a request goes through between being counted and being sent, outermost first.
        services: What runs beside the requests.
        sites: Applications of their own under a path prefix, e.g. `/admin`; paths of the gateway itself go first.
        identify: Whose request it is, from its headers; None: nobody must say who he is.
        counted: The metrics; None: with the default bounds, and of this process alone.
        kept: Which backend keeps which response; None: as far as this process knows.
        watchers: What a request about a stored response goes through.
    """

    def __init__(
        self,
        portfolio: Portfolio,
        stages: Sequence[Stage],
        services: Sequence[Service] = (),
        sites: Mapping[str, Application] | None = None,
        identify: Callable[[Fields], Principal] | None = None,
        counted: metrics.Metrics | None = None,
        kept: Kept | None = None,
        watchers: Sequence[Stage] = (),
    ) -> None:
        self.settings = portfolio.settings
        self.portfolio = portfolio
        self.metrics = counted or metrics.Metrics(self.portfolio)
        self._services = [self.metrics, *services]
        self._sites = dict(sites or {})
        self._identify = identify
        self._upstream: Upstream | None = None
        self.prober = Prober(self.portfolio, self.upstream, self.settings)
        kept = kept or Kept()
        counting = metrics.MetricsStage(self.metrics)
        self._handle = compose([counting, *stages], Forwarder(self.upstream, self.settings, kept).handle)
        stored = Stored(self.upstream, self.portfolio, kept)
        self._handle_stored = compose([counting, *watchers], stored.handle)
        self._background = Background(stored)
        self._endpoints: dict[str, Endpoint] = {
            "/health": self._health,
            "/ready": self._ready,
            # What probes of a LiteLLM proxy ask for, in charts and compose files.
            "/health/liveliness": self._health,
            "/health/liveness": self._health,
            "/health/readiness": self._ready,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
            "/docs": self._docs,
        }
        origins = self.settings.allowed_origins
        #: Where nobody needs a key, a page must not ask through the browser of somebody who reaches this address.
        self._cross_site = CrossSite(origins) if identify is None else None
        #: Answers what a page of another origin may ask for too.
        self._open: Application = Cors(origins, self._http) if origins else self._http

    def upstream(self) -> Upstream:
        """The HTTP client; it lives from the lifespan's start to its end."""
        assert self._upstream is not None, "the gateway has not been started"
        return self._upstream

    async def start(self) -> None:
        """Opens the HTTP client, starts probing and the services."""
        self._upstream = Upstream(self.settings)
        self.prober.start()
        for service in self._services:
            await service.start()
        await self.prober.first_look()

    async def stop(self) -> None:
        """Ends the services and probing, and closes the HTTP client."""
        for service in reversed(self._services):
            await service.stop()
        await self.prober.stop()
        await self.upstream().close()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """ASGI entry."""
        if scope["type"] == "lifespan":
            return self._lifespan(receive, send)
        path = scope["path"]
        if path in _POST_ONLY:
            return self._open(scope, receive, send)
        site = self._site(path) if self._sites else None
        if site is None:
            # The metrics name teams and what they cost.
            site = self._http if path == "/metrics" else self._open
        return site(scope, receive, send)

    def _site(self, path: str) -> Application | None:
        """The application under whose prefix a path lies."""
        return next(
            (site for prefix, site in self._sites.items() if path == prefix or path.startswith(prefix + "/")), None
        )

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                except TokenmillError as error:
                    log.error("cannot start: %s", error)
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        method: str = scope["method"]
        fields = first_values(scope["headers"])
        identity = request_id(fields)
        known = path in _POST_ONLY
        model: str | None = None
        if not known and path not in self._endpoints and not path.startswith("/v1/"):
            path, model = paths.usual(path)
            known = path in _POST_ONLY
            scope["path"] = path
        response = None if known else about(path)
        if response is None:
            asks_a_model = method == "POST" and (known or _is_passed(path)) and path not in self._endpoints
        else:
            asks_a_model = method in response.methods
        try:
            if asks_a_model:
                if self._cross_site is not None and b"origin" in fields and method != "GET":
                    self._cross_site.check(fields, scope["server"])
                if response is None:
                    await self._inference(scope, fields, receive, send, identity, model)
                else:
                    await self._of_response(scope, fields, receive, send, identity)
                return
            reply = await self._local(method, path, fields, response)
        except ApiError as error:
            if asks_a_model:
                self.metrics.refuse(path, error.status)
            reply = error_reply(error, path)
        except ClientGoneError:
            return
        except Exception:
            # Ours to repair: the client gets no traceback, the log does.
            log.exception("request %s failed", identity)
            reply = error_reply(ApiError(500, f"The gateway failed; its log has request {identity}."), path)
        await send_whole(scope, send, reply, identity)

    async def _local(self, method: str, path: str, fields: Fields, response: About | None) -> Reply:
        """An answer of the gateway's own; raises 404 or 405."""
        model = path.removeprefix(_MODEL_PREFIX) if path.startswith(_MODEL_PREFIX) else ""
        endpoint = self._endpoints.get(path)
        if endpoint is not None or model or path == "/v1/models" or path in model_info.PATHS:
            allowed = b"GET, HEAD, OPTIONS"
        elif path in _POST_ONLY:
            allowed = b"POST, OPTIONS"
        elif response is not None:
            allowed = ", ".join([*response.methods, "OPTIONS"]).encode()
        else:
            raise ApiError(404, f"There is no {method} {_shown(path)} here; see /docs.", code="not_found")
        if method == "OPTIONS":
            return Reply(204, [(b"allow", allowed)])
        if method not in ("GET", "HEAD") or path in _POST_ONLY or response is not None:
            raise ApiError(
                405,
                f"{_shown(path)} takes {allowed.decode().split(',')[0]}, not {method}.",
                code="method_not_allowed",
                headers=[(b"allow", allowed)],
            )
        if endpoint is not None:
            return await endpoint()
        models = self._models(fields)
        if path in model_info.PATHS:
            names = [listed["id"] for listed in models]
            return json_reply({"data": model_info.described(names, self.portfolio.targets)})
        return self._model(model, models) if model else json_reply({"object": "list", "data": models})

    async def _inference(
        self, scope: Scope, fields: Fields, receive: Receive, send: Send, identity: str, model: str | None
    ) -> None:
        """Answers a request to a model; `model` is the one that its path names, if it does."""
        started = time.perf_counter()
        length = fields.get(b"content-length")
        if self._identify is not None and (length is None or len(length) > _SHORT_DIGITS):
            # Who may ask for nothing has nothing kept in memory; a short body came with the head.
            self._identify(fields)
        payload = await read_body(receive, fields, self.settings)
        if model is not None:
            payload = await with_model(payload, model)
            scope["query_string"] = b""  # Azure's `api-version`
        exchange = await exchange_of(scope, fields, payload, identity, started)
        del payload  # the exchange has it, as long as it is needed
        await self._answer(scope, send, exchange, self._handle)

    async def _of_response(self, scope: Scope, fields: Fields, receive: Receive, send: Send, identity: str) -> None:
        """Answers a request about a response that a backend keeps."""
        started = time.perf_counter()
        principal = None if self._identify is None else self._identify(fields)
        if scope["method"] != "GET":
            await read_body(receive, fields, self.settings)
        headers: Headers = scope["headers"]
        exchange = Exchange(
            scope["path"],
            headers,
            b"",
            fields=fields,
            body=None,
            model=None,
            request_id=identity,
            forward=forwarded_headers(headers, fields, identity),
            query=scope["query_string"],
            started=started,
        )
        exchange.method = scope["method"]
        exchange.principal = principal
        await self._answer(scope, send, exchange, self._handle_stored)

    async def _answer(self, scope: Scope, send: Send, exchange: Exchange, handle: Handler) -> None:
        """Has a request handled, and sends the reply; all that has to be done at its end is done."""
        identity = exchange.request_id
        hangup = _Hangup(scope)
        try:
            try:
                reply = await handle(exchange)
                outcome: Outcome = "ok" if reply.status < 400 else "failed"
            except ApiError as error:
                reply = error_reply(error, exchange.endpoint)
                outcome = "refused" if error.status < 500 else "failed"
            exchange.status = reply.status
            if reply.chunks is None:
                await send_whole(scope, send, reply, identity)
            else:
                outcome = await send_stream(send, reply, exchange, self.settings)
            exchange.outcome = outcome
        except asyncio.CancelledError:
            exchange.outcome = "gone" if hangup.happened else "cut"
            if not hangup.swallow():
                self._background.give_up(exchange)
                raise
        except Exception:
            exchange.outcome = "failed"
            if not exchange.status:
                self._background.give_up(exchange)
                raise
            # The reply has begun: all that can be done is to break it off, by returning before its end.
            log.exception("request %s failed in the middle of its reply", identity)
        finally:
            hangup.stop()
            try:
                if exchange.goes_on is not None:
                    exchange.answered()
                    scope[BREAK_OFF]()  # its client does not wait for that
                    await self._background.watch(exchange)
            finally:
                self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        try:
            exchange.end()
        except Exception:
            log.exception("request %s: what had to be done at its end failed", exchange.request_id)

    async def _health(self) -> Reply:
        return json_reply({"status": "ok"})

    async def _ready(self) -> Reply:
        # Workers share a port and each sees the backends with its own eyes; who asks must be able to tell them apart.
        unready, worker = self.portfolio.unready_tiers(), os.getpid()
        if not unready:
            return json_reply({"status": "ready", "worker": worker})
        wait = (b"retry-after", str(self.settings.retry_after_s).encode())
        return json_reply({"status": "not ready", "tiers": unready, "worker": worker}, 503, [wait])

    async def _metrics(self) -> Reply:
        if not self.metrics.for_all:
            raise ApiError(403, "Metrics are at /admin/metrics, for keys with a role.", code="forbidden")
        return Reply(200, [(b"content-type", metrics.CONTENT_TYPE)], await self.metrics.render())

    def _models(self, fields: Fields) -> list[dict[str, Any]]:
        """The models that whoever sent these headers may ask for."""
        models = self.portfolio.models()
        if self._identify is None:
            return models
        principal = self._identify(fields)
        return [model for model in models if principal.may_ask_for(model["id"])]

    def _model(self, name: str, models: list[dict[str, Any]]) -> Reply:
        for model in models:
            if model["id"] == name:
                return json_reply(model)
        raise model_not_found(name)

    async def _openapi(self) -> Reply:
        return Reply(200, [JSON], openapi.document())

    async def _docs(self) -> Reply:
        return Reply(200, [(b"content-type", b"text/html; charset=utf-8")], openapi.page())


class _Hangup:
    """Cancels the task it was made in when the client hangs up."""

    __slots__ = ("_task", "happened")

    def __init__(self, scope: Scope) -> None:
        self._task = asyncio.current_task()
        self.happened = False
        scope[ON_HANGUP](self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self.happened = True
            self._task.cancel()

    def swallow(self) -> bool:
        """Whether the cancellation that has just arrived was this one; if so, it is over."""
        if self.happened and self._task is not None:
            self._task.uncancel()
        return self.happened

    def stop(self) -> None:
        """The request has ended; nothing is cancelled any more."""
        self._task = None


def _is_passed(path: str) -> bool:
    passed = _PASSED_PATH.fullmatch(path) is not None and not path.startswith("/v1/models")
    return passed and path not in _OPERATORS


def _shown(path: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in unquote(path)[:100])
