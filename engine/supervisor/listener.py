"""Binds the port that clients connect to, and says who has it when it is taken."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from tokenmill.errors import ConfigurationError

BACKLOG = 4096
#: `st` of a listening socket in /proc/net/tcp.
_LISTENING = "0A"


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Args:
        host: Name or address of an interface of this machine.
        port: 0 takes a free one.

    Raises:
        ConfigurationError: The address is not ours, the port is taken or not allowed; one line with a remedy.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigurationError(f"host {host!r} is unknown; pass --host 127.0.0.1 or 0.0.0.0") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(_refusal(error, host, port)) from None
    listener.set_inheritable(True)
    return listener


class ReservedPort:
    """A free port of 127.0.0.1 that stays ours while the server behind it is restarted.

    The reservation is a bound socket that never listens: Linux hands its number to no program that asks for any
    free port, and lets a program that names the port and sets SO_REUSEADDR, as vLLM does, listen on it.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Gives the port back."""
        self._socket.close()


def free_port(near: int) -> int:
    """A port of 127.0.0.1 that nobody listens on now, the next one above `near` if there is one."""
    for port in (*range(near + 1, min(near + 50, 65536)), 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    return 0


def owner_of(port: int) -> str | None:
    """`name (pid N)` of the process that listens on a TCP port of this machine; None when Linux does not tell us."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or another user's
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if descriptor.readlink().name in inodes:
                        return f"{(process / 'comm').read_text(encoding='utf-8').strip()} (pid {process.name})"
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    return inodes


def _refusal(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        owner = owner_of(port)
        return (
            f"port {port} on {host} is taken by {owner or 'another program'}; stop it or pass --port {free_port(port)}"
        )
    if error.errno == errno.EACCES:
        return (
            f"port {port} needs more rights than this user has; pass a port above 1023, e.g. --port {free_port(8000)}"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine; pass --host 127.0.0.1 or 0.0.0.0"
    return f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0).lower()}"
