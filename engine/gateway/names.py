"""The addresses of backends' names.

An event loop has few threads for such questions (uvloop: two), and one that waits for a server of names in vain holds
its thread for many seconds: two names that nobody knows at the moment would keep all others from being found. So each
name is asked for once at a time, by a thread of its own.
"""

import asyncio
import contextlib
import errno
import functools
import ipaddress
import socket
import threading

#: Hosts of which it is remembered whether they are addresses.
_MOST_HOSTS = 256


class Names:
    """Finds addresses; create it inside a running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str) -> list[str]:
        """The addresses of a host, in the order in which they are to be tried; nothing is remembered of them.

        Raises:
            OSError, UnicodeError: it has none, nobody says, or nobody could be asked.
        """
        if _is_address(host):
            return [host]
        asked = self._asked.get(host)
        if asked is None:
            asked = self._loop.create_future()
            # Who waited may have given up: an answer that nobody wants is none to be complained of.
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                # Not a pool's: the end of the process would wait for it.
                threading.Thread(target=self._ask, args=(host, asked), daemon=True).start()
            except RuntimeError as error:  # this host has no more threads for us: the next one asks again
                raise OSError(errno.EAGAIN, str(error)) from None
            self._asked[host] = asked
        return await asyncio.shield(asked)

    def _ask(self, host: str, asked: "asyncio.Future[list[str]]") -> None:
        found: list[str] | Exception
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell, host, asked, found)

    def _tell(self, host: str, asked: "asyncio.Future[list[str]]", found: list[str] | Exception) -> None:
        del self._asked[host]
        if isinstance(found, Exception):
            asked.set_exception(found)
        else:
            asked.set_result(list(dict.fromkeys(found)))


@functools.lru_cache(maxsize=_MOST_HOSTS)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
