"""Taking a changed configuration file without an interruption: what it may change, and when its workers serve."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tokenmill.engine.supervisor.keeper import Keeper, why_ended
from tokenmill.engine.supervisor.plan import Plan

#: Seconds for new workers to see every tier up; what nobody can reach is not waited for longer.
SETTLE_SECONDS = 5.0
#: Seconds for them to answer at all.
PATIENCE_SECONDS = 60.0


def has_terminal() -> bool:
    """Whether this process belongs to a terminal: then SIGHUP says that it is gone. Otherwise people send it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def refusal(before: Plan, after: Plan) -> str | None:
    """Why a server that runs by one plan cannot go on by another; None: it can."""
    if (before.server.host, before.server.port) != (after.server.host, after.server.port):
        return "'server.host' or 'server.port' has changed; start the server anew"
    started, wanted = ({engine.name: (engine.command, engine.environment) for engine in plan.engines}
                       for plan in (before, after))  # fmt: skip
    changed = [name for name in (started | wanted) if started.get(name) != wanted.get(name)]
    return f"what it starts has changed ({', '.join(changed)}); start the server anew" if changed else None


async def failure(workers: Sequence[Keeper], ask: Callable[[], Awaitable[tuple[int, Any] | None]]) -> str | None:
    """Waits until all of some new workers serve; returns why one of them does not, None when they do.

    Args:
        workers: They are being started.
        ask: Asks any worker whether every tier is up for it: (status, what it says, its process id with it).
    """
    answered: set[int] = set()
    seeing: set[int] = set()
    begun = time.monotonic()
    while True:
        children = [worker.child for worker in workers if worker.child is not None]
        for worker, child in zip(workers, children, strict=False):
            if child.exit_status is not None:
                await asyncio.sleep(0.2)  # its last words are still in the pipe
                return f"{worker.name} {why_ended(child)}"
        waited = time.monotonic() - begun
        started = {child.pid for child in children}
        if len(started) == len(workers) and started <= (answered if waited > SETTLE_SECONDS else seeing):
            return None
        if waited > PATIENCE_SECONDS:
            return f"its workers do not answer within {PATIENCE_SECONDS:g} s"
        # Several at once: of connections that come one by one a worker that is always the quicker may take each.
        for answer in await asyncio.gather(*(ask() for _ in range(2 * len(workers)))):
            if answer is not None:
                answered.add(answer[1]["worker"])
                if answer[0] == 200:
                    seeing.add(answer[1]["worker"])
        await asyncio.sleep(0.02)
