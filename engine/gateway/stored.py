"""Requests about a response that a backend keeps: to read it, also as a stream, to cancel and to delete it.

They go to the backend that gave it (`kept`), for whoever it was given to. Nothing is generated, so nothing is reserved
or charged: the response was, when it was asked for (`background`).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tokenmill.engine.gateway import anthropic
from tokenmill.engine.gateway.api_error import EVENT_STREAM_TYPE, ApiError, Headers, unavailable
from tokenmill.engine.gateway.connection import ConnectFailedError, CutError, NoAnswerError, SilenceError
from tokenmill.engine.gateway.forward import whole, with_key
from tokenmill.engine.gateway.governance.identify import CREDENTIALS
from tokenmill.engine.gateway.heads import without
from tokenmill.engine.gateway.kept import Kept, is_same_server, not_found
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.upstream import Answer, Upstream

_PATH = re.compile(r"/v1/responses/([A-Za-z0-9_~:@-][A-Za-z0-9_.~:@-]{0,255})(/cancel|/input_items)?")
#: What each path takes, by what follows the id.
_METHODS: Mapping[str, tuple[str, ...]] = {"": ("GET", "DELETE"), "/cancel": ("POST",), "/input_items": ("GET",)}
#: Paths of that form that name no response.
_OTHERS = frozenset({"/v1/responses/input_tokens", "/v1/responses/compact"})
#: What is passed on: none of these paths reads a body, and no policy has searched what else a client or a proxy says,
#: which is nothing to a server that may stand in the cloud.
_PASSED = anthropic.CREDENTIALS | {b"accept", b"accept-encoding", b"openai-beta"}


class About(NamedTuple):
    """What a path is about.

    Attributes:
        response: The id.
        methods: Those that the path takes.
    """

    response: str
    methods: tuple[str, ...]


def about(path: str) -> About | None:
    """What a path asks about a response; None: it is about none."""
    found = _PATH.fullmatch(path)
    if found is None or path in _OTHERS:
        return None
    return About(found[1], _METHODS[found[2] or ""])


class Stored:
    """Asks the backends that keep the responses.

    Args:
        upstream: The HTTP client.
        portfolio: The backends.
        kept: Which of them keeps which response.
    """

    def __init__(self, upstream: Callable[[], Upstream], portfolio: Portfolio, kept: Kept) -> None:
        self._upstream = upstream
        self._portfolio = portfolio
        self._kept = kept

    async def handle(self, exchange: Exchange) -> Reply:
        """The backend's answer; 404 for a response that nobody keeps for this client."""
        asked = about(exchange.endpoint)
        assert asked is not None, "the path is about a response"
        exchange.target = target = await self._holder(asked.response, exchange)
        exchange.forward = [header for header in exchange.forward if header[0] in _PASSED]
        if exchange.principal is not None:
            exchange.forward = without(exchange.forward, CREDENTIALS)
        exchange.attempts = 1
        name = target.backend.name
        try:
            body = b"" if exchange.method == "POST" else None
            answer = await self.ask(target, exchange.method, exchange.target_path, exchange.forward, body)
            exchange.on_end(lambda _: answer.close())
            if answer.status < 400 and answer.content_type == EVENT_STREAM_TYPE:
                return Reply(answer.status, answer.headers, None, answer.chunks())
            return _shown(answer, await answer.read(), name)
        except ConnectFailedError as error:
            target.mark_down(str(error))
            raise self._unavailable(name, "cannot be reached") from None
        except NoAnswerError:
            raise self._unavailable(name, "closed the connection without an answer") from None
        except SilenceError:
            raise ApiError(504, f"The backend {name} was silent for too long.", code="timeout") from None
        except CutError:
            what = f"The backend {name} broke off in the middle of its answer."
            raise ApiError(502, what, code="upstream_cut") from None

    async def ask(
        self, target: Target, method: str, path: bytes, headers: Headers, body: bytes | None = None
    ) -> Answer:
        """One request to a backend with its own key; raises what `Upstream.send` does."""
        if target.backend.api_key is not None:
            headers = with_key(headers, target.backend.api_key)
        return await self._upstream().send(method.encode(), target.origin, path, headers, body)

    async def _holder(self, response: str, exchange: Exchange) -> Target:
        targets = [one for one in self._portfolio.targets if one.backend.protocol == "openai"]
        holder = await self._kept.holder(response, exchange.principal, targets)
        if holder is None and targets and all(is_same_server(one, targets[0]) for one in targets):
            holder = targets[0]  # as after a start: whom else could one ask?
        if holder is None:
            raise not_found(response)
        return holder

    def _unavailable(self, name: str, what: str) -> ApiError:
        return unavailable(f"The backend {name} {what}.", self._portfolio.settings.retry_after_s)


def _shown(answer: Answer, body: bytes, name: str) -> Reply:
    if 300 <= answer.status < 400:
        what = f"The backend {name} redirects (status {answer.status})"
        raise ApiError(502, f"{what}; correct its address in the configuration.", code="upstream_redirect")
    return whole(answer, body)
