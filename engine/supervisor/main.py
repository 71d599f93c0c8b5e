"""`tokenmill serve`."""

import asyncio
import fcntl
import itertools
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tokenmill import env
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices, dollars
from tokenmill.engine.supervisor import arguments
from tokenmill.engine.supervisor.display import Display
from tokenmill.engine.supervisor.keeper import StartError
from tokenmill.engine.supervisor.listener import listen
from tokenmill.engine.supervisor.plan import ENGINE_COMMAND, Plan, make_plan
from tokenmill.engine.supervisor.supervisor import Supervisor


def main(argv: list[str]) -> int:
    """Serves until a signal; returns 0, or 1 when a server could not start.

    Raises:
        ConfigurationError: An argument, the configuration file or the port is wrong.
    """
    if any(argument.startswith("--help=") for argument in argv):
        return subprocess.run([*ENGINE_COMMAND, *argv], check=False).returncode
    request = arguments.parse(argv)
    plan = _planned(request)
    console = Console()
    if request.check_only:
        console.out(_summary(plan, request.source), highlight=False)
        return 0
    server = request.config.server
    display = Display(console, verbose=request.verbose)
    listener = None if request.headless else listen(server.host, server.port)
    display.begin()
    port = 0
    if listener is not None:
        host, port = listener.getsockname()[:2]
        display.done("port", "bound", f"{host}:{port}")
    logs = _log_folder(port)
    display.done("logs", "written to", str(logs))
    try:
        replan = None if request.source is None else lambda: _planned(arguments.parse(argv))
        return asyncio.run(_run(plan, listener, logs, display, replan))
    except StartError as error:
        Console(stderr=True).out(f"tokenmill serve: {error}", highlight=False)
        return 1
    finally:
        display.end()


async def _run(
    plan: Plan, listener: socket.socket | None, logs: Path, display: Display, replan: Callable[[], Plan] | None
) -> int:
    return await Supervisor(plan, listener, logs, display, replan).run()


def _planned(request: arguments.Request) -> Plan:
    """The plan of what was asked for; tells what was left out of it."""
    plan = make_plan(request.config, request.engine_arguments)
    for line in request.left_out:
        Console(stderr=True).out(line, highlight=False)
    return plan


def _log_folder(port: int) -> Path:
    """The folder for the log files of a server on this port; a temporary one where the cache cannot be written.

    It is this process's alone until that ends: one on the same port of another address, or of another machine that has
    the same cache, takes `8000-2`. In one folder they would take each other's figures for those of their own workers.
    """
    folder = first = env.CACHE.get() / "logs" / (str(port) if port else "headless")
    try:
        for number in itertools.count(2):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):  # another user's, e.g. of a first start as root
                raise PermissionError
            if _takes(folder):
                break
            folder = first.with_name(f"{first.name}-{number}")
        return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="tokenmill-"))


def _takes(folder: Path) -> bool:
    """Takes a folder until this process ends, however it ends; False while another one has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks
        os.close(descriptor)
    return True


def _remote(backend: Backend) -> str:
    """A server elsewhere with what limits it, in one line."""
    names = ", ".join(public if public == own else f"{public} ({own})" for public, own in backend.model_names.items())
    limits = [
        f"{value} {what}"
        for value, what in (
            (backend.requests_per_minute, "requests/min"),
            (backend.tokens_per_minute, "tokens/min"),
            (backend.max_concurrency, "at once"),
        )
        if value is not None
    ]
    parts = [backend.root, names or "all that it lists", backend.zone, f"weight {backend.weight:g}", *limits]
    return "; ".join([*parts, *_price(backend.prices)])


def _price(prices: Prices) -> list[str]:
    """What a million tokens cost; nothing where they cost nothing."""
    written, hour = prices.writing
    each = [(prices.prompt, "in"), (prices.cached, "cached")]
    each += [(written, "written")] if written != prices.prompt else []
    each += [(hour, "written for an hour")] if hour != written else []
    each += [(prices.completion, "out")]
    if not any(price for price, _ in each):
        return []
    return [", ".join(f"${dollars(price):g} {what}" for price, what in each) + " per million tokens"]


def _summary(plan: Plan, source: Path | None) -> str:
    lines = [f"{source or 'the command line'}: good"]
    lines += [f"  tier {engine.tier}: {' '.join(engine.command[4:])}" for engine in plan.engines]
    lines += [f"  tier {remote.tier}: {_remote(remote)}" for remote in plan.remotes]
    for when, named in (
        ("", plan.fallbacks),
        (", for a long prompt,", plan.context_window_fallbacks),
        (", for refused content,", plan.content_policy_fallbacks),
    ):
        lines += [f"  tier {tier} falls back{when} to {', '.join(others)}" for tier, others in named.items()]
    if plan.governance is not None:
        lines.append(f"  keys and budgets in {plan.governance.store}")
    return "\n".join(lines)
