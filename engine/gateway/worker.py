"""The gateway as a process: `python -m tokenmill.engine.gateway.worker --fd N`.

The parent binds and listens on a TCP socket, lets the worker inherit it as file descriptor N (several workers may
share one socket) and writes one `settings.Document` as JSON to the worker's standard input, then closes it.
The worker

* answers requests as soon as it accepts; it probes the backends itself and needs no further word from its parent,
* ends within `drain_s` after SIGTERM or SIGINT: stops accepting at once, lets open requests end, then exits with 0,
* accepts no more after SIGHUP, and exits with 0 after the last answer on its last connection, however long that takes:
  others on the socket take its place,
* is killed by the kernel when the thread that started it ends (Linux: PR_SET_PDEATHSIG), so `kill -9` of the
  parent leaves no orphan. Start workers from the parent's main thread.

Exit status 2: the document or a variable is wrong; 3: what it names cannot be used. One line on standard error says
how.
"""

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys

import uvicorn

from tokenmill import env
from tokenmill.engine.gateway.acceptor import Server
from tokenmill.engine.gateway.assembly import create_app
from tokenmill.engine.gateway.protocol import protocol_class
from tokenmill.engine.gateway.settings import Document
from tokenmill.errors import ConfigurationError, TokenmillError

#: linux/prctl.h
PR_SET_PDEATHSIG = 1
#: malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in bytes, M_ARENA_MAX.
MALLOPT = {-1: 8 << 20, -3: 1 << 20, -8: 2}
#: How long a thread may hold the interpreter while the event loop waits, in seconds. Rendering metrics
#: runs in a thread; Python's default of 5 ms would be seen in the tail of every request's latency.
SWITCH_INTERVAL_S = 0.0005


def die_with_parent(parent_pid: int | None) -> None:
    """Asks the kernel to kill this process when its parent ends; exits if the parent is already gone."""
    expected = os.getppid() if parent_pid is None else parent_pid
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:
        raise SystemExit(1)


def give_memory_back() -> None:
    """Has glibc return long bodies to the system when they are done with, all but a few megabytes.

    By default it learns from the first freed one to keep blocks of that size, and the process stays as large as the
    most that was ever open at once. Returning everything takes longer than all else that is done with a body: its parts
    would have their memory anew, page by page, with every read.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def log_to_stderr() -> None:
    """One line per event. The gateway reports its own failures; uvicorn's lines on malformed requests are noise."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tokenmill").setLevel(env.LOG_LEVEL.get().upper())
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)


def spare_the_collector() -> None:
    """What is loaded by now lives as long as the process: keeps the collector from walking it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def serve(document: Document, listener: socket.socket) -> None:
    """Serves on a listening socket until SIGTERM or SIGINT, then drains and returns."""
    settings = document.settings
    config = uvicorn.Config(
        create_app(document),
        loop="uvloop",
        http=protocol_class(settings),
        interface="asgi3",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.keep_alive_s),
    )
    # It is declared as whole seconds, and waited for as any timeout.
    config.timeout_graceful_shutdown = settings.drain_s  # type: ignore[assignment]
    server = Server(config)
    signal.signal(signal.SIGHUP, lambda *_: server.retire())
    spare_the_collector()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def main(arguments: list[str] | None = None) -> int:
    """Reads the document from standard input and serves on the inherited socket."""
    parser = argparse.ArgumentParser(prog="tokenmill.engine.gateway.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the listening socket")
    options = parser.parse_args(arguments)
    try:
        document = Document.from_json(sys.stdin.buffer.read())
        log_to_stderr()
    except ConfigurationError as error:
        return _refuse(error, 2)
    die_with_parent(document.parent_pid)
    give_memory_back()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # uvicorn raises the signal again after draining; a drained worker has done what it was asked to and exits with 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(fileno=options.fd) as listener:
        try:
            serve(document, listener)
        except TokenmillError as error:
            return _refuse(error, 3)
    return 0


def _refuse(error: TokenmillError, status: int) -> int:
    print(f"gateway worker: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
