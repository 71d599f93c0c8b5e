"""Which backend keeps a response of the Responses API, and whose it is.

vLLM keeps them in the memory of one server: to all others of its tier `previous_response_id` names nothing. No server
knows the gateway's keys: who may go on from a response, read or cancel it is decided here. What is remembered is shared
by the workers of one gateway, and bounded: a response's place is taken by a later one. Where several machines share a
store, it is asked for what is not remembered (`register`).
"""

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tokenmill.engine.gateway.api_error import ApiError, quote
from tokenmill.engine.gateway.governance.accounts import MASTER
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.register import Register
from tokenmill.engine.gateway.upstream import Answer

PATH = "/v1/responses"
_FIELD, _CONVERSATION = "previous_response_id", "conversation"
#: By it vLLM's clients may choose what their response is called.
_CHOSEN = "request_id"
#: Responses remembered.
SLOTS = 1 << 18
#: Bytes that tell one response, one backend and one owner from others.
_TAG_BYTES = 8
SLOT_BYTES = 3 * _TAG_BYTES
#: A stream's first event, up to the id of the response that it speaks of.
_BEGINS = re.compile(rb'(?:event:[^\n]*\n)?data: ?\{[^{]*"response": ?\{"id": ?"([^"\\]{1,256})"')
#: A first event with as many ends of lines, or as long, has told whatever it tells.
_LINES, _MOST_BYTES = 2, 64 * 1024
#: How a response stands whose answer is not there yet.
_UNFINISHED = ("queued", "in_progress")


class _Response(msgspec.Struct):
    id: str
    status: str | None = None


_ANSWER = msgspec.json.Decoder(_Response)
_TEXT = msgspec.json.Decoder(str)


class Kept:
    """What is remembered.

    Args:
        file: Where the workers share it; None: this process is alone.
        register: What other machines know, too; None: there are none.
    """

    def __init__(self, file: Path | None = None, register: Register | None = None) -> None:
        self._slots = _mapped(file)
        self._register = register

    def learn(self, said: bytes, target: Target, exchange: Exchange) -> None:
        """Takes down who gave an answer to whom, and whether the backend goes on with it."""
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            response = _ANSWER.decode(said)
            self._learn(response.id, target, exchange)
            exchange.goes_on = response.id if response.status in _UNFINISHED else None

    async def learn_streamed(self, answer: Answer, target: Target, exchange: Exchange) -> None:
        """The same of a stream, of which all stays to be read. Waits for its first event where half of that has come.

        Raises:
            NoAnswerError, SilenceError: it broke off, or paused too long, before that.
        """
        while True:
            said = answer.arrived()
            found = _BEGINS.match(said)
            if found is not None:
                name = found[1].decode("utf-8", "replace")
                self._learn(name, target, exchange)
                exchange.goes_on = name if is_background(exchange) else None
            if found is not None or said.count(b"\n") >= _LINES or len(said) > _MOST_BYTES or not await answer.more():
                return

    def _learn(self, name: str, target: Target, exchange: Exchange) -> None:
        if name:
            owner = _owner(exchange.principal)
            self._keep(name, target, owner)
            # What the client will not have kept nobody asks for.
            if (
                self._register is not None
                and exchange.body is not None
                and exchange.body.raw_field("store") != b"false"
            ):
                self._register.enter(name, owner, target)

    def _keep(self, name: str, target: Target, owner: str) -> None:
        at = _place(name)
        who = _tag(target.backend.name) + _tag(owner)
        self._slots[at : at + SLOT_BYTES] = _seal(name, who) + who

    def _find(self, name: str) -> tuple[bytes, bytes] | None:
        """Tags of the backend that keeps a response, and of its owner; None: it is not known."""
        at = _place(name)
        slot = self._slots[at : at + SLOT_BYTES]
        who = slot[_TAG_BYTES:]
        # Of two workers that wrote here at the same time a mixture may be left: that is neither's.
        return (who[:_TAG_BYTES], who[_TAG_BYTES:]) if slot[:_TAG_BYTES] == _seal(name, who) else None

    async def holder(self, name: str, principal: Principal | None, targets: Sequence[Target]) -> Target | None:
        """The backend that keeps a response; None: it is not known, or is none of these.

        Args:
            name: The response's id.
            principal: Who asks for it; None: nobody must say who he is.
            targets: The backends.

        Raises:
            ApiError: 404 where it is not known to be this principal's; of the master key all are. 503 where only the
                store may know, and it cannot be asked.
        """
        whose = None if principal is None or principal.key == MASTER else _owner(principal)
        found = self._find(name)
        if found is not None and (whose is None or found[1] == _tag(whose)):
            return next((one for one in targets if _tag(one.backend.name) == found[0]), None)
        entry = None if self._register is None else await self._register.find(name, whose)
        if entry is None:
            if whose is not None:
                raise not_found(name)
            return None
        holder = entry.among(targets)
        if holder is not None:
            self._keep(name, holder, entry.owner)
        return holder

    async def narrowed(self, exchange: Exchange) -> Sequence[Route]:
        """The routes to the server that keeps what a request goes on from; all of them where that is not known.

        Raises:
            ApiError: 404 where that is another's; 400 for a field that only one who needs no key may send, or for a
                `background` that is no truth value; 503 as of `holder`.
        """
        routes, body = exchange.routes, exchange.body
        if body is None:
            return routes
        is_background(exchange)  # a mistake in it is found before anybody works on the request
        if exchange.principal is not None and body.raw_field(_CHOSEN) not in (None, b"null"):
            raise ApiError(
                400,
                f"`{_CHOSEN}` would name the response, perhaps like another's; where keys are asked for, leave it out.",
                code="invalid_field",
                param=_CHOSEN,
            )
        principal = exchange.principal
        if principal is not None and principal.key != MASTER and body.raw_field(_CONVERSATION) not in (None, b"null"):
            raise ApiError(
                400,
                f"`{_CONVERSATION}` names what a backend keeps for its whole account, and nobody could tell whose of "
                f"the gateway's keys it is; go on from a response by `{_FIELD}`.",
                code="invalid_field",
                param=_CONVERSATION,
            )
        raw = body.raw_field(_FIELD)
        if raw is None or raw == b"null":
            return routes
        try:
            name = _TEXT.decode(raw)
        except msgspec.MsgspecError:
            return routes
        holder = await self.holder(name, exchange.principal, [one for route in routes for one in route.targets])
        if holder is None:
            return routes
        found = []
        for route in routes:
            targets = tuple([one for one in route.targets if is_same_server(one, holder)])
            if targets:
                found.append(route.only(targets))
        return found


def refers_back(exchange: Exchange) -> bool:
    """Whether a request goes on from a response that some backend keeps."""
    return exchange.endpoint == PATH and exchange.body is not None and exchange.body.raw_field(_FIELD) is not None


def is_background(exchange: Exchange) -> bool:
    """Whether the backend is to go on with a response also when its client has gone.

    Raises:
        ApiError: 400 where that is no truth value.
    """
    return exchange.endpoint == PATH and exchange.body is not None and bool(exchange.body.get("background", bool))


def is_same_server(one: Target, other: Target) -> bool:
    """Whether two backends are one server's, or one account's, under two names."""
    first, second = one.backend, other.backend
    return one is other or (first.base_url == second.base_url and first.api_key == second.api_key)


def not_found(name: str) -> ApiError:
    """404 as vLLM has it."""
    message = f"Response with id '{quote(name)}' not found."
    return ApiError(404, message, code="not_found", param="response_id", kind="invalid_request_error")


def _owner(principal: Principal | None) -> str:
    """Whose a response is: all keys of a team, or of an app without one, may go on from it."""
    return "" if principal is None else principal.team or principal.app or principal.key


def _place(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % SLOTS * SLOT_BYTES


def _seal(name: str, who: bytes) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=_TAG_BYTES, key=who).digest()


def _tag(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_TAG_BYTES).digest()


def _mapped(file: Path | None) -> mmap.mmap:
    size = SLOTS * SLOT_BYTES
    if file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Where the disk is full now, not when it is written to, which would end the process.
                os.posix_fallocate(descriptor, 0, size)
                return mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
    return mmap.mmap(-1, size)
