"""The dashboard as an ASGI application: pages and style sheet are made here, no script, nothing from elsewhere."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route, Router

from tokenmill import __version__
from tokenmill.engine.gateway.admin import canaries, roles
from tokenmill.engine.gateway.admin.roles import Actor
from tokenmill.engine.gateway.admin.views import iso
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.dashboard import charts, session
from tokenmill.engine.gateway.dashboard.figures import SPANS, Figures, Sources, collect, used_share
from tokenmill.engine.gateway.database import StoreUnavailableError
from tokenmill.engine.gateway.heads import first_values
from tokenmill.engine.gateway.request import ClientGoneError, Receive, Scope, Send, read_body
from tokenmill.engine.gateway.settings import Settings

log = logging.getLogger("tokenmill.gateway.dashboard")

PREFIX = "/dashboard"
HERE = Path(__file__).resolve().parent
#: Seconds for which collected figures are shown again: many eyes cost no more than two.
KEPT_S = 2.0
#: Seconds after which an open page asks again.
REFRESH_S = 15
#: More than any of our forms has.
_MOST_FIELDS = 20
_FORM = Settings(max_body_bytes=8 * 1024, body_timeout_s=10.0)
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer, browsers send forms with `Origin: null`
}

Handler = Callable[[Request], Awaitable[Response]]


class DashboardSite:
    """The application; call it with (scope, receive, send).

    Args:
        sources: What it shows.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._options = sources.governance.options
        self._assets = {
            name: ((HERE / name).read_text(encoding="utf-8"), kind)
            for name, kind in (("style.css", "text/css"), ("icon.svg", "image/svg+xml"))
        }
        pages = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
        )
        pages.globals.update(charts=charts, iso=iso, used_share=used_share, version=__version__, refresh=REFRESH_S)
        pages.trim_blocks = pages.lstrip_blocks = True
        self._pages = pages
        self._kept: dict[str, tuple[float, asyncio.Task[Figures]]] = {}
        self._router = Router(
            routes=[
                *(Route(path, self._guarded(self._overview)) for path in (PREFIX, f"{PREFIX}/")),
                *(Route(f"{PREFIX}/{name}", self._asset) for name in self._assets),
                Route(f"{PREFIX}/login", self._answering(self._login_page)),
                Route(f"{PREFIX}/login", self._guarded_form(self._login), methods=["POST"]),
                Route(f"{PREFIX}/logout", self._guarded_form(self._logout), methods=["POST"]),
                Route(f"{PREFIX}/canary", self._guarded_form(self._set_canary), methods=["POST"]),
            ],
            default=_not_found,
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            await self._router(scope, receive, send)
        except ClientGoneError:
            return

    def _actor(self, request: Request) -> Actor | None:
        value = request.cookies.get(session.COOKIE, "")
        return session.actor_of(self._sources.governance.store.reader, self._options, value)

    def _guarded(self, show: Callable[[Request, Actor], Awaitable[Response]]) -> Handler:
        """A page for those who are logged in; others go to the login."""

        async def guarded(request: Request) -> Response:
            actor = self._actor(request)
            if actor is None:
                return RedirectResponse(f"{PREFIX}/login", 303, _HEADERS)
            return await show(request, actor)

        return self._answering(guarded)

    def _answering(self, run: Handler) -> Handler:
        """A handler that answers with a page whatever happens."""

        async def answering(request: Request) -> Response:
            try:
                return await run(request)
            except ApiError as error:
                said = error
            except StoreUnavailableError as error:
                said = self._sources.governance.unreadable(error)
            except ClientGoneError:
                raise
            except Exception:
                log.exception("the dashboard failed")
                said = ApiError(500, "The dashboard failed; the gateway's log has the reason.")
            answer = self._said(said.message, said.status)
            answer.headers.update({name.decode(): value.decode() for name, value in said.headers})
            return answer

        return answering

    def _guarded_form(self, run: Callable[[Request, dict[str, str]], Awaitable[Response]]) -> Handler:
        """A form's target: the form must come from a page of ours and be short."""

        async def guarded(request: Request) -> Response:
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
                return self._said("This form was sent by another site.", 403)
            raw = await read_body(request.receive, first_values(request.scope["headers"]), _FORM)
            try:
                fields = parse_qs(raw.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
            except ValueError:
                raise ApiError(400, f"The form has more than {_MOST_FIELDS} fields.") from None
            return await run(request, {name: values[0] for name, values in fields.items()})

        return self._answering(guarded)

    async def _login_page(self, request: Request) -> Response:
        if self._actor(request) is not None:
            return RedirectResponse(PREFIX, 303, _HEADERS)
        return self._page("login.html.jinja", problem="")

    async def _login(self, request: Request, fields: dict[str, str]) -> Response:
        key = fields.get("key", "").strip()
        store, guesses = self._sources.governance.store, self._sources.governance.guesses
        actor = roles.identify(store.reader, guesses, key) if key else None
        if actor is None or not actor.may("auditor"):
            return self._page(
                "login.html.jinja", 403, problem="This is neither the master key nor one that may see all."
            )
        answer = RedirectResponse(PREFIX, 303, _HEADERS)
        # Of several proxies the first one says what the browser speaks.
        outside = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
        secure = "https" in (request.url.scheme, outside)
        answer.set_cookie(
            session.COOKIE,
            session.cookie(store.reader, self._options, actor),
            max_age=session.LIFETIME_S,
            path=PREFIX,
            httponly=True,
            samesite="strict",
            secure=secure,
        )
        return answer

    async def _logout(self, request: Request, fields: dict[str, str]) -> Response:
        if not self._token_fits(request, fields):
            return self._said("The form is too old; load the page again.", 403)
        ended = request.cookies.get(session.COOKIE, "")
        await self._sources.governance.store.write(partial(session.end, value=ended))
        answer = RedirectResponse(f"{PREFIX}/login", 303, _HEADERS)
        answer.delete_cookie(session.COOKIE, path=PREFIX, httponly=True, samesite="strict")
        return answer

    async def _set_canary(self, request: Request, fields: dict[str, str]) -> Response:
        actor = self._actor(request)
        if actor is None or not self._token_fits(request, fields):
            return self._said("The form is too old; load the page again.", 403)
        if not actor.may("admin"):
            return self._said("This needs the role admin.", 403)
        name, said = fields.get("backend", ""), fields.get("percent", "").strip()
        try:
            share = None if not said else float(said) / 100
        except ValueError:
            share = -1.0
        if share is not None and not 0 <= share <= 1:
            return self._said("A share is a number from 0 to 100, or empty for a backend like the others.", 400)
        if name not in {target.backend.name for target in self._sources.engines.portfolio.targets}:
            return self._said("There is no such backend.", 404)
        by = f"dashboard: {actor.name}"
        await self._sources.governance.store.write(partial(canaries.put, backend=name, share=share, actor=by))
        self._kept.clear()
        return RedirectResponse(f"{PREFIX}#backends", 303, _HEADERS)

    def _token_fits(self, request: Request, fields: dict[str, str]) -> bool:
        cookie = request.cookies.get(session.COOKIE, "")
        reader = self._sources.governance.store.reader
        return session.token_fits(reader, self._options, cookie, fields.get("token", ""))

    async def _overview(self, request: Request, actor: Actor) -> Response:
        asked = request.query_params.get("span", "24h")
        span = asked if asked in SPANS else "24h"
        figures = await self._figures(span)
        reader = self._sources.governance.store.reader
        token = session.token(reader, self._options, request.cookies[session.COOKIE])
        # It takes milliseconds, and where it is the first one tens of them; requests to models go on meanwhile.
        still = "still" in request.query_params  # for who reads or writes for longer than a page stands
        page = partial(self._page, f=figures, actor=actor, token=token, spans=list(SPANS), still=still)
        return await asyncio.to_thread(page, "overview.html.jinja")

    async def _figures(self, span: str) -> Figures:
        """The figures, collected at most every few seconds, however many look."""
        made_at, task = self._kept.get(span, (0.0, None))
        # Of a large ledger that takes longer than pages wait: those who come meanwhile get what is under way.
        if task is None or (task.done() and time.monotonic() - made_at >= KEPT_S):
            task = asyncio.create_task(collect(self._sources, span))
            self._kept[span] = (time.monotonic(), task)
        return await asyncio.shield(task)

    async def _asset(self, request: Request) -> Response:
        text, kind = self._assets[request.url.path.rpartition("/")[2]]
        return Response(text, media_type=kind, headers={**_HEADERS, "cache-control": "max-age=300"})

    def _page(self, name: str, status: int = 200, **values: object) -> Response:
        return HTMLResponse(self._pages.get_template(name).render(**values), status, _HEADERS)

    def _said(self, text: str, status: int) -> Response:
        return self._page("said.html.jinja", status, text=text)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("There is no such page.\n", 404, _HEADERS, "text/plain")(scope, receive, send)
