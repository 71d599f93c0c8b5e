"""Which backend keeps a response of the Responses API, so that the next turn of its conversation goes there.

vLLM keeps them in the memory of one server: to all others of its tier `previous_response_id` names nothing. What is
remembered is shared by the workers of one gateway, and bounded: a response's place is taken by a later one.
"""

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.upstream import Answer

PATH = "/v1/responses"
_FIELD = "previous_response_id"
#: Responses remembered.
SLOTS = 1 << 16
#: Bytes that tell one response, and one backend, from others.
_TAG_BYTES = 8
_SLOT_BYTES = 2 * _TAG_BYTES
#: A stream's first event, up to the id of the response that it speaks of.
_BEGINS = re.compile(rb'(?:event:[^\n]*\n)?data: ?\{[^{]*"response": ?\{"id": ?"([^"\\]{1,256})"')
#: A first event with as many ends of lines, or as long, has told whatever it tells.
_LINES, _MOST_BYTES = 2, 64 * 1024


class _Response(msgspec.Struct):
    id: str


_ANSWER = msgspec.json.Decoder(_Response)
_TEXT = msgspec.json.Decoder(str)


class Kept:
    """What is remembered.

    Args:
        file: Where the workers share it; None: this process is alone.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._slots = _mapped(file)

    def learn(self, said: bytes, target: Target) -> None:
        """Takes down who gave an answer."""
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._keep(_ANSWER.decode(said).id.encode(), target)

    async def learn_streamed(self, answer: Answer, target: Target) -> None:
        """The same of a stream, of which all stays to be read. Waits for its first event where half of that has come.

        Raises:
            NoAnswerError, SilenceError: it broke off, or paused too long, before that.
        """
        while True:
            said = answer.arrived()
            found = _BEGINS.match(said)
            if found is not None:
                self._keep(found[1], target)
            if found is not None or said.count(b"\n") >= _LINES or len(said) > _MOST_BYTES or not await answer.more():
                return

    def _keep(self, name: bytes, target: Target) -> None:
        if name:
            at, tag = _place(name)
            # Another worker may write here at the same time: a mixture of two is neither's.
            self._slots[at : at + _SLOT_BYTES] = tag + _tag(target)

    def narrowed(self, exchange: Exchange) -> Sequence[Route]:
        """The routes to the server that keeps what a request goes on from; all of them where that is not known."""
        routes, body = exchange.routes, exchange.body
        raw = None if body is None else body.raw_field(_FIELD)
        if raw is None or raw == b"null":
            return routes
        try:
            at, tag = _place(_TEXT.decode(raw).encode("utf-8", "replace"))
        except msgspec.MsgspecError:
            return routes
        kept = self._slots[at : at + _SLOT_BYTES]
        if kept[:_TAG_BYTES] != tag:
            return routes
        holder = next((one for route in routes for one in route.targets if _tag(one) == kept[_TAG_BYTES:]), None)
        if holder is None:
            return routes
        found = []
        for route in routes:
            targets = tuple([one for one in route.targets if _is_same_server(one, holder)])
            if targets:
                found.append(route.only(targets))
        return found


def refers_back(exchange: Exchange) -> bool:
    """Whether a request goes on from a response that some backend keeps."""
    return exchange.endpoint == PATH and exchange.body is not None and exchange.body.raw_field(_FIELD) is not None


def _place(name: bytes) -> tuple[int, bytes]:
    """Where a response is remembered, and what stands there."""
    digest = hashlib.blake2b(name, digest_size=4 + _TAG_BYTES).digest()
    return int.from_bytes(digest[:4], "big") % SLOTS * _SLOT_BYTES, digest[4:]


def _tag(target: Target) -> bytes:
    return hashlib.blake2b(target.backend.name.encode(), digest_size=_TAG_BYTES).digest()


def _is_same_server(one: Target, other: Target) -> bool:
    """Whether two backends are one server's, or one account's, under two names."""
    first, second = one.backend, other.backend
    return one is other or (first.base_url == second.base_url and first.api_key == second.api_key)


def _mapped(file: Path | None) -> mmap.mmap:
    size = SLOTS * _SLOT_BYTES
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
