"""Responses that a backend works on after it has answered (`background` of the Responses API): what they used.

Such an answer comes at once, without a count, and the backend goes on also when its client hangs up. So the request
is not settled until its response is there: it is looked at now and then. One whose end cannot be seen is charged
everything that was reserved: nobody knows how far it came.
"""

import asyncio

import msgspec

from tokenmill.engine.gateway.connection import ConnectFailedError, CutError, NoAnswerError, SilenceError
from tokenmill.engine.gateway.kept import PATH
from tokenmill.engine.gateway.pipeline import Call, Exchange, Usage
from tokenmill.engine.gateway.stored import Stored, about
from tokenmill.engine.gateway.usage import read_usage

#: Seconds until a response is looked at first; each time after that is half as long again.
FIRST_S, LONGEST_S = 0.5, 15.0
#: Looks in a row that show nothing, after which a response counts as lost.
MOST_FAILURES = 8
#: Seconds after which nobody looks any more.
GIVEN_UP_S = 6 * 3600.0
_ACCEPT = [(b"accept", b"application/json"), (b"accept-encoding", b"identity")]


class _Status(msgspec.Struct):
    status: str | None = None


_STATUS = msgspec.json.Decoder(_Status)


class Background:
    """Looks at what goes on.

    Args:
        stored: Asks the backends.
    """

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    async def watch(self, exchange: Exchange) -> None:
        """Returns when the backend has done what it goes on with, and its tokens are those of the exchange's call."""
        call, response = exchange.answering, exchange.goes_on
        self.give_up(exchange)
        if response is None or call is None or call.usage.exact or exchange.principal is None:
            return
        if about(f"{PATH}/{response}") is not None:
            await self._look(response, call)

    def give_up(self, exchange: Exchange) -> None:
        """Nobody will look: what was seen of a stream is not all, so nothing was seen that could be counted."""
        call, goes_on = exchange.answering, exchange.goes_on is not None
        exchange.goes_on = None
        if goes_on and exchange.principal is not None and call is not None and not call.usage.exact:
            call.usage = Usage()

    async def _look(self, response: str, call: Call) -> None:
        loop = asyncio.get_running_loop()
        end, pause, failures = loop.time() + GIVEN_UP_S, FIRST_S, 0
        while failures < MOST_FAILURES and loop.time() < end:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_S)
            status = await self._once(response, call)
            if status is None:
                failures += 1
                continue
            failures = 0
            if status not in ("queued", "in_progress"):
                if status == "failed" and not call.usage.exact:
                    call.status = 500  # an error costs nothing
                return

    async def _once(self, response: str, call: Call) -> str | None:
        """How the response stands; takes what it used. None: its backend does not say."""
        path = f"{PATH}/{response}".encode()
        try:
            answer = await self._stored.ask(call.target, "GET", path, _ACCEPT)
        except (ConnectFailedError, NoAnswerError, SilenceError):
            return None
        try:
            body = await answer.read()
            status = _STATUS.decode(body).status if answer.status < 400 else None
        except (CutError, SilenceError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        finally:
            answer.close()
        if status is not None:
            read_usage(body, call.usage)
        return status
