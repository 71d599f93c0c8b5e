"""The admin API as an ASGI application: checks who asks and what, runs an endpoint, answers JSON."""

import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from tokenmill.engine.gateway import metrics
from tokenmill.engine.gateway.admin import litellm_keys, roles
from tokenmill.engine.gateway.admin.endpoint import Call, Endpoint
from tokenmill.engine.gateway.admin.endpoints import ENDPOINTS, NOT_KEPT, Backends
from tokenmill.engine.gateway.admin.openapi import document
from tokenmill.engine.gateway.api_error import ApiError, invalid_json, quote
from tokenmill.engine.gateway.database import StoreUnavailableError
from tokenmill.engine.gateway.governance.identify import credential
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.heads import first_values
from tokenmill.engine.gateway.metrics import Metrics
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.request import ClientGoneError, Receive, Scope, Send, read_body, request_id
from tokenmill.engine.gateway.settings import Settings
from tokenmill.errors import InputError

log = logging.getLogger("tokenmill.gateway.admin")

#: Path prefixes that this application answers.
PREFIXES = ("/admin", "/key")
CONTENT_TYPE = metrics.CONTENT_TYPE.decode()
MOST_BODY_BYTES = 256 * 1024
_SETTINGS = Settings(max_body_bytes=MOST_BODY_BYTES, body_timeout_s=10.0)


class AdminSite:
    """The application; call it with (scope, receive, send).

    Args:
        governance: Whose store it administrates.
        portfolio: The backends.
        counted: The metrics.
    """

    def __init__(self, governance: Governance, portfolio: Portfolio, counted: Metrics) -> None:
        self._governance = governance
        self._portfolio = portfolio
        self._counted = counted
        table: tuple[Endpoint, ...] = (
            *ENDPOINTS,
            Endpoint("GET", "/admin/metrics", "Metrics for Prometheus.", self._metrics, "auditor", media=CONTENT_TYPE),
            *Backends(portfolio).endpoints(),
            *litellm_keys.ENDPOINTS,
        )
        self._document = document(table)
        routes = [*self._routes(table), Route("/admin/openapi.json", self._openapi)]
        self._router = Router(routes=routes, default=_not_found, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            await self._router(scope, receive, send)
        except ClientGoneError:
            return

    def _routes(self, table: Sequence[Endpoint]) -> list[Route]:
        """One route per path; the methods of a path share it, so that others get 405."""
        paths: dict[str, dict[str, Endpoint]] = {}
        for endpoint in table:
            paths.setdefault(endpoint.path, {})[endpoint.method] = endpoint
        return [Route(path, self._serve(methods), methods=_EVERY_METHOD) for path, methods in paths.items()]

    def _serve(self, methods: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            endpoint = methods.get("GET" if request.method == "HEAD" else request.method)
            try:
                if endpoint is None:
                    raise _wrong_method(methods)
                return await self._run(endpoint, request)
            except ApiError as error:
                return answer_error(error)
            except InputError as error:
                missing = str(error).startswith("there is no ")
                return answer_error(ApiError(404 if missing else 400, f"{error}.", code="invalid_input"))
            except StoreUnavailableError as error:
                return answer_error(self._governance.unreadable(error))
            except ClientGoneError:
                raise
            except Exception:
                identity = request_id(first_values(request.scope["headers"]))
                log.exception("admin request %s failed", identity)
                return answer_error(ApiError(500, f"The gateway failed; its log has request {identity}."))

        return serve

    async def _run(self, endpoint: Endpoint, request: Request) -> Response:
        actor = self._actor(request)
        if not endpoint.admits(actor):
            raise ApiError(403, f"This needs the role {endpoint.role}; this key has none such.", code="forbidden")
        body = None
        if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
            raise _nul("path or the query")
        _check_query(endpoint, request)
        if endpoint.body is not None:
            raw = await read_body(request.receive, first_values(request.scope["headers"]), _SETTINGS)
            if _NUL.search(raw) is not None:
                raise _nul("body")
            body = _decoded(raw, endpoint.body, request)
        answer = await endpoint.run(Call(actor, self._governance, request, body, self._portfolio.virtual))
        if isinstance(answer, Response):
            return answer
        return Response(orjson.dumps(answer), endpoint.status, media_type="application/json", headers=NOT_KEPT)

    def _actor(self, request: Request) -> roles.Actor:
        key = credential(first_values(request.scope["headers"]))
        if not key:
            raise _unauthorized("The key is missing; send `Authorization: Bearer KEY` with the master or an admin key.")
        actor = roles.identify(self._governance.store.reader, self._governance.guesses, key)
        if actor is None:
            raise _unauthorized("The key is not valid; send the master key or one with a role.")
        return actor

    async def _metrics(self, _call: Call) -> Response:
        return Response(await self._counted.render(), headers={**NOT_KEPT, "content-type": CONTENT_TYPE})

    async def _openapi(self, _request: Request) -> Response:
        return Response(self._document, media_type="application/json")


#: A NUL in JSON: an odd number of backslashes before it.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
#: Every one reaches an endpoint's function, which refuses those that it does not take in the API's own shape.
_EVERY_METHOD = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
#: Paths whose clients were written for others, LiteLLM's and Prometheus: they may add to the query what they like.
_OF_OTHERS = frozenset({"/admin/metrics", *(endpoint.path for endpoint in litellm_keys.ENDPOINTS)})


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])


def _check_query(endpoint: Endpoint, request: Request) -> None:
    """Refuses parameters of `/admin` that would be ignored: `organization=acme` sums over all."""
    given = [name for name, _ in request.query_params.multi_items()]
    if not given or endpoint.path in _OF_OTHERS:
        return
    known = [parameter.name for parameter in endpoint.query]
    for name in given:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ApiError(400, f"There is no parameter `{quote(name)}` here; {takes}.", code="unknown_parameter")
        if given.count(name) > 1:
            raise ApiError(400, f"`{name}` is given {given.count(name)} times; give it once.", param=name)


def _nul(where: str) -> ApiError:
    """400: PostgreSQL keeps no text with a NUL, and nobody needs it to."""
    return ApiError(
        400, f"The {where} of the request has a NUL character (U+0000); leave it out.", code="invalid_input"
    )


def _wrong_method(methods: Iterable[str]) -> ApiError:
    allowed = ", ".join(methods)
    return ApiError(
        405, f"This path takes {allowed}.", code="method_not_allowed", headers=[(b"allow", allowed.encode())]
    )


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(404, "There is no such path; see /admin/openapi.json.", code="not_found")
    await answer_error(error)(scope, receive, send)


def _decoded(raw: bytes, kind: type[msgspec.Struct], request: Request) -> Any:
    """The body as its type; the fields as they came stay in `request.state.fields`."""
    try:
        fields = msgspec.json.decode(raw)
        request.state.fields = fields
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"The request body does not fit: {error}.", code="invalid_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_json(str(error)) from None


def answer_error(error: ApiError) -> Response:
    """The error in the API's shape."""
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body(), error.status, {**headers, **NOT_KEPT}, "application/json")
